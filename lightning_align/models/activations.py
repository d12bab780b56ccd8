"""Less memory for activations: layers keep their inputs only, and run again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. The inputs may be kept on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Any]
"""A function of a module, its ``forward``, and the arguments."""
Checkpointing = bool | Literal["offload"]
"""Whether layers run again in the backward pass. With ``offload`` their inputs wait on the host."""


def checkpointed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer and keep only its input."""
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


class _OnHost:
    """A tensor of a device that is copied to pinned host memory while the device goes on."""

    def __init__(self, tensor: Tensor, stream: Any) -> None:
        self.device = tensor.device
        self.tensor = torch.empty_like(tensor, device="cpu", pin_memory=True, memory_format=torch.contiguous_format)
        stream.wait_stream(torch.accelerator.current_stream(self.device))
        with stream:
            self.tensor.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not used again before the copy has ended
        self.copied = torch.Event(device=self.device)
        self.copied.record(stream)

    def back(self) -> Tensor:
        """Copy the tensor to its device again."""
        torch.accelerator.current_stream(self.device).wait_event(self.copied)
        return self.tensor.to(self.device, non_blocking=True)


class Offload:
    """Keeps saved tensors of a device on the host. Tensors that are on the host already stay as they are."""

    def __init__(self, least: int = 2**16) -> None:
        """Start without a stream.

        Args:
            least: The bytes from which on a tensor is moved.
        """
        self.least = least
        self._streams: dict[torch.device, Any] = {}

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.device.type == "cpu" or tensor.nbytes < self.least or isinstance(tensor, nn.Parameter):
            return tensor
        stream = self._streams.setdefault(tensor.device, torch.Stream(tensor.device))
        return _OnHost(tensor, stream)

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        tensor: Tensor = packed.back() if isinstance(packed, _OnHost) else packed
        return tensor

    def __call__(self) -> AbstractContextManager[None]:
        """Return a context in which this holds for the tensors that autograd saves."""
        hooks: AbstractContextManager[None] = saved_tensors_hooks(self._pack, self._unpack)
        return hooks


def layers_of(model: nn.Module) -> list[tuple[nn.Module, Run]]:
    """Return the layers that run again, each with the function that runs it.

    They are what ``layers_to_recompute`` of the model says, or its ``blocks``. Layers of transformers that already keep only
    their inputs are left out.
    """
    own: Any = getattr(model, "layers_to_recompute", None)
    if own is not None:
        layers: list[tuple[nn.Module, Run]] = own()
        return layers
    blocks = getattr(model, "blocks", ())
    return [(block, checkpointed) for block in blocks if not getattr(block, "gradient_checkpointing", False)]


@contextmanager
def recomputing(layers: Sequence[tuple[nn.Module, Run]], *, offload: Offload | None = None) -> Iterator[None]:
    """Checkpoint layers within a ``with`` block. The backward pass may come after it.

    What is replaced is ``forward`` and not ``__call__``, so that hooks run once, also those that gather sharded parameters.

    Args:
        layers: The modules of the layers, each with the function that runs it.
        offload: Keeps the inputs of the layers on the host.
    """
    undo = _replace(layers, offload)
    try:
        yield
    finally:
        undo()


def _replace(layers: Sequence[tuple[nn.Module, Run]], offload: Offload | None) -> Callable[[], None]:
    """Do what `recomputing` describes, and return the function that restores it."""
    replaced = [(module, module.__dict__.get("forward"), run) for module, run in layers]
    for module, _, run in replaced:
        module.forward = partial(_with_gradients, run, module, module.forward, offload or nullcontext)

    def undo() -> None:
        for module, own, _ in replaced:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own

    return undo


def _with_gradients(
    run: Run,
    module: nn.Module,
    forward: Callable[..., Any],
    context: Callable[[], AbstractContextManager[None]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with context():
        return run(module, forward, *args, **kwargs)


class ActivationSwitch:
    """Checkpoints the layers of a policy from the start of a training step to its end, which are calls of different hooks."""

    def __init__(self, wanted: Checkpointing = False) -> None:
        """Choose whether layers run again.

        Args:
            wanted: What the user asked for.

        Raises:
            ValueError: If it is none of the choices.
        """
        if wanted not in (False, True, "offload"):
            raise ValueError(f"`activation_checkpointing` must be false, true or 'offload', but got {wanted!r}.")
        self.wanted = wanted
        self._offload = Offload() if wanted == "offload" else None
        self._undo: Callable[[], None] | None = None  # no open context: it would be closed when it is collected, at any moment

    def start(self, model: nn.Module) -> None:
        """Checkpoint the layers of a model, if that is wanted.

        Raises:
            ValueError: If the model does not say which layers it has.
        """
        self.end()
        if not self.wanted:
            return
        if not hasattr(model, "layers_to_recompute") and not len(getattr(model, "blocks", ())):
            raise ValueError(
                f"`activation_checkpointing` must be false for a {type(model).__name__}, because it has no `blocks`, the list "
                "of its layers. Add this attribute to the model."
            )
        self._undo = _replace(layers_of(model), self._offload)

    def end(self) -> None:
        """Run the layers as before."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
