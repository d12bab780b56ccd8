"""Sharding and compilation of a model after it is built. The model classes themselves do not handle process groups."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

T = TypeVar("T")


class GatherPolicy(MixedPrecisionPolicy):
    """Gathers weights in the dtype of a mixed precision, and reduces gradients in float32 (of float64 weights in float64).

    Autocast alone would gather float32 and keep a cast copy of each weight for the backward pass, so that each rank would hold
    a whole model. The copies that FSDP2 gathers are freed after each block.

    The inputs of a block are not cast: rotary tables must stay in float32. Under autocast its output, the residual stream, is
    in float32, as it is without sharding. An ``nn.LayerNorm`` on a CPU does not take this beside a gain of 16 bits.
    """

    _device: str
    _model: Callable[[], nn.Module | None]
    _widens: bool
    _dtype: torch.dtype | None

    def __init__(self, device: str, model: nn.Module, *, dtype: torch.dtype | None) -> None:
        """Set the policy.

        Args:
            device: The type of the device.
            model: The model that will be sharded.
            dtype: The dtype of the gathered weights. None takes that of autocast at the first forward pass, if it is on.
        """
        widens = device != "cpu" or not any(isinstance(module, nn.LayerNorm) for module in model.modules())
        for name, value in {"device": device, "model": weakref.ref(model), "widens": widens, "dtype": dtype}.items():
            object.__setattr__(self, f"_{name}", value)  # the class is frozen

    def _autocast(self) -> torch.dtype | None:
        return torch.get_autocast_dtype(self._device) if torch.is_autocast_enabled(self._device) else None

    @property
    def param_dtype(self) -> torch.dtype | None:
        """The dtype of the gathered weights. None is their own."""
        return self._dtype or self._autocast()

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """The dtype in which gradients are reduced and accumulated. None is that of the gathered weights."""
        model = self._model()
        weight = None if model is None else next(model.parameters(), None)  # its precision may be converted after sharding
        return None if weight is not None and weight.dtype is torch.float64 else torch.float32

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the outputs of blocks. None leaves them as they are."""
        return torch.float32 if self._widens and self._autocast() is not None else None

    cast_forward_inputs = False


def shard(model: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Shard the parameters of a model over the ranks of a mesh with FSDP2.

    Each block is sharded separately, so that the forward pass gathers the parameters of one block at a time. The other
    parameters are sharded together.

    Args:
        model: The model, with its layers in ``blocks`` if it has them. It is changed in place.
        mesh: A one-dimensional device mesh.
        dtype: The dtype of gathered weights under a mixed precision. Default is that of autocast at the first forward pass, or
            that of the weights without autocast. The sharded weights keep their dtype.

    Returns:
        The model.
    """
    policy = GatherPolicy(mesh.device_type, model, dtype=dtype)
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.gather_policy = policy  # type: ignore[assignment]  # no module
    for name in ("hidden", "packed_hidden", "unpadded_hidden"):
        if hasattr(model, name):
            # Without this, only `forward` gathers the sharded parameters.
            register_fsdp_forward_method(model, name)
    return model


def within_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """Call a function in the middle of a forward pass of a sharded model, so that its outermost weights are gathered.

    Args:
        model: The sharded model. Every rank must call this.
        function: The function. It may run parts of the model.
    """
    untyped: Any = model
    results: list[T] = []
    untyped.call_within = lambda: results.append(function())
    register_fsdp_forward_method(model, "call_within")
    try:
        untyped.call_within()
    finally:
        del untyped.call_within
    return results[0]


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

    During decoding the cache grows with each token, so each step would be compiled again. A step that is compiled as a whole
    stays so.
    """
    if getattr(model, "compile_backend", None) is None or torch.compiler.is_compiling():
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
