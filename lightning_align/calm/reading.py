"""Reading the hidden states of a frozen augment: no gradients, only the layers that are asked for, and nothing above them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.layers import Layer, Position, Tap, visiting
from lightning_align.models.language_model import has_hidden
from lightning_align.runtime.ranks import is_sharded


class _Enough(Exception):  # it is no error
    """All layers that are read have been."""


class Reader:
    """Reads one augment; a plain object, so that the model stands in the module tree once.

    Args:
        model: the augment.
        layers: all its layers.
        depths: those that are read, counted from 1, ascending.
        position: whether at their inputs or outputs.
        prefix: whether it reads something of its own, once.
        own: whether it has a tokenizer of its own.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], depths: list[int], position: Position, *, prefix: bool, own: bool
    ) -> None:
        self.model, self.depths, self.prefix, self.own = model, depths, prefix, own
        self.taps = {depth: Tap(layers[depth - 1].site(position)) for depth in depths}

    def read(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> dict[int, Tensor]:
        """Run the model up to the last layer that is read.

        Args:
            tokens: (B, M) ids, or what the model takes.
            mask: (B, M) bool, true at what exists; with a cache of all its columns.
            positions: (M,) or (B, M) int64, or None.
            cache: the model's own, or None; extended in place.

        Returns:
            Hidden states (B, M, A) by layer.
        """
        states: dict[int, Tensor] = {}
        # Stopping by an exception leaves the gathered parameters of a sharded model where they are, for ever.
        stops = not is_sharded(self.model)

        def keep(depth: int) -> Callable[[Tensor], None]:
            def visit(hidden: Tensor) -> None:
                # A copy: where no gradients are kept, models may write the next layer's state over this one's.
                states[depth] = hidden.detach().clone()
                if stops and len(states) == len(self.taps):
                    raise _Enough

            return visit

        past: int = 0 if cache is None else cache.length
        with torch.no_grad(), visiting({tap: keep(depth) for depth, tap in self.taps.items()}):
            try:
                run_model(self.model, tokens, mask=mask, positions=positions, cache=cache)
            except _Enough:
                if cache is not None:
                    cache.length = past + tokens.shape[1]
        if missing := [depth for depth in self.depths if depth not in states]:
            raise ValueError(
                f"the augment {type(self.model).__name__} did not pass through its layers {missing}: was the composition "
                "released, or the model compiled before it was composed?"
            )
        return states


def run_model(
    model: nn.Module, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None, cache: Any = None
) -> Any:
    """Call a model with what it can take of a mask, positions and a cache.

    Raises:
        ValueError: if it takes no mask, and something in it does not exist.
    """
    if has_hidden(model):
        return model.hidden(tokens, mask=mask, positions=positions, cache=cache)
    if mask is None:
        return model(tokens)
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted:
        return model(tokens, attention_mask=mask.long())
    if "mask" in accepted:
        return model(tokens, mask=mask)
    if not bool(mask.all()):
        raise ValueError(f"{type(model).__name__} takes no mask, and a part of its input is padding: give rows of one length")
    return model(tokens)
