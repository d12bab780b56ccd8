"""Training without dropout: the policy computes as in evaluation mode, with gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout and all other noise of training off within a ``with`` block, then restore the mode of each submodule.

    All submodules are set to evaluation mode. This covers layers of dropout, functional dropout whose probability is an
    attribute or a field of a configuration, dropout of LoRA and PEFT adapters, skipped layers, and jitter of expert routers.
    What depends on the training mode and is not noise stays as it is:

    - Layers of transformers with gradient checkpointing are computed again in the backward pass. They check their mode first.
    - Recurrent layers of torch stay in training mode, because cuDNN has no backward pass for their evaluation mode. Their
      dropout probability is set to 0.

    The backward pass belongs into the block, because it may compute layers again.

    Args:
        model: Any module.
    """
    undo = _switch_off(model)
    try:
        yield
    finally:
        _run(undo)


def _switch_off(model: nn.Module) -> list[Callable[[], None]]:
    """Do what `without_dropout` describes, and return the functions that restore it, the last one first."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if not module.training:
            continue
        if isinstance(module, nn.RNNBase):
            undo.append(_set(module, "dropout", 0.0))
        elif _is_checkpointed(module):
            undo.append(_set(module, "_gradient_checkpointing_func", _in_evaluation_mode(module)))
        else:
            undo.append(_set(module, "training", False))
    return undo


def _run(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _is_checkpointed(module: nn.Module) -> bool:
    """Return whether a module is a layer of transformers that checkpoints its own forward pass in training mode."""
    layer = any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
    return layer and bool(getattr(module, "gradient_checkpointing", False))


def _set(module: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute, and return a function that restores it."""
    before = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, before)


def _in_evaluation_mode(layer: Any) -> Callable[..., Any]:
    """Wrap the checkpointing function of a layer, so that what it runs and runs again sees the evaluation mode."""
    checkpoint = layer._gradient_checkpointing_func

    def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*inner: Any, **options: Any) -> Tensor | tuple[Any, ...]:
            before, layer.training = layer.training, False
            try:
                result: Tensor | tuple[Any, ...] = function(*inner, **options)
                return result
            finally:
                layer.training = before

        return checkpoint(run, *args, **kwargs)

    return wrapped


class DropoutSwitch:
    """Switches dropout off at the start of a training step and restores it at the end, which are calls of different hooks."""

    def __init__(self, dropout: bool | None, *, default: bool) -> None:
        """Choose whether there is dropout.

        Args:
            dropout: What the user asked for, or None for the default.
            default: Whether there is dropout by default.
        """
        self.off = not (default if dropout is None else dropout)
        self._announced = dropout is not None
        self._undo: list[Callable[[], None]] = []  # no open context: it would be closed when it is collected, at any moment

    def start(self, model: nn.Module) -> None:
        """Switch dropout off, if it is to be off; see `without_dropout`."""
        self.end()
        if self.off:
            self._undo = _switch_off(model)

    def end(self) -> None:
        """Restore the mode of each submodule."""
        _run(self._undo)

    def announce(self, model: nn.Module) -> None:
        """Log once that a model has layers of dropout which are off by default."""
        layers = (module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd))
        largest = max((layer.p for layer in layers), default=0.0)
        if self.off and not self._announced and largest > 0:
            rank_zero_info(
                f"Dropout of up to {largest:g} is off in policy and reference, so that both score alike. To train with it, set "
                "`dropout` to true."
            )
        self._announced = True
