"""Sharding and compilation of a model after it is built. The model classes themselves do not handle process groups."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the parameters of a model over the ranks of a mesh with FSDP2.

    Each block is sharded separately, so that the forward pass gathers the parameters of one block at a time. The other
    parameters are sharded together.

    Args:
        model: The model, with its layers in ``blocks`` if it has them. It is changed in place.
        mesh: A one-dimensional device mesh.

    Returns:
        The model.
    """
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ("hidden", "packed_hidden"):
        if hasattr(model, name):
            # Without this, only `forward` gathers the sharded parameters.
            register_fsdp_forward_method(model, name)
    return model


def compile_blocks(blocks: nn.ModuleList, backend: str) -> None:
    """Compile each layer of a model separately and in place.

    Identical layers share one compilation. The names of weights do not change. Call this before the layers are sharded.

    Args:
        blocks: The layers.
        backend: The backend of `torch.compile`.

    Raises:
        ValueError: If there is no such backend.
    """
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"`compile` must be a backend of torch.compile ({', '.join(known)}), but got {backend!r}.")
    for block in blocks:
        block.compile(backend=backend)


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Run the layers of a model without compilation within a ``with`` block.

    During decoding the cache grows with each token, so each step would be compiled again.
    """
    return nullcontext() if getattr(model, "compile_backend", None) is None else torch.compiler.set_stance("force_eager")
