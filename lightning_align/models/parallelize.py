"""Sharding and compilation, applied to a built model: the model files know no process groups."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model's parameters over the ranks of a mesh (FSDP2): each block by itself, then the rest.

    Args:
        model: changed in place; its ``blocks``, where it has them, are gathered one at a time.
        mesh: one-dimensional.

    Returns:
        The model.
    """
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ("hidden", "packed_hidden"):
        if hasattr(model, name):
            # Only `forward` gathers the parameters by itself.
            register_fsdp_forward_method(model, name)
    return model


def compile_blocks(blocks: nn.ModuleList, backend: str) -> None:
    """Compile the layers of a model, each by itself and in place: alike as they are, one compilation serves them all.

    Names of weights stay as they are. To be called before the layers are sharded.

    Args:
        blocks: the layers.
        backend: of `torch.compile`.

    Raises:
        ValueError: if there is no such backend.
    """
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"compile is {backend!r}; expected a backend of torch.compile: {', '.join(known)}")
    for block in blocks:
        block.compile(backend=backend)


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Runs a model's layers as they are: a token at a time, with a cache that grows, each step would be compiled anew."""
    return nullcontext() if getattr(model, "compile_backend", None) is None else torch.compiler.set_stance("force_eager")
