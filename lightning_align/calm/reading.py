"""A reader of a frozen augment's hidden states.

It computes no gradients, keeps only the requested layers, and runs no layer above the last of them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.layers import Layer, Position, Tap, visiting
from lightning_align.models.language_model import has_cache, has_hidden
from lightning_align.models.unpadded import Unpadded
from lightning_align.runtime.ranks import is_sharded


class _StopReading(Exception):  # control flow, not an error
    """Raised when the states of all requested layers are known."""


class Reader:
    """A reader of one augment. It is not a module, so that the model is registered only once in the module tree.

    Args:
        model: The augment.
        layers: All layers of the augment.
        places: The layers to read, counted from 1, and whether to read their inputs or their outputs.
        prefix: Whether the augment reads a separate input once, all of which is visible to every position of the anchor.
        own: Whether the augment has its own tokenizer.
        mask_kwarg: The name of the argument with which the model takes its mask. None to find it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        places: Mapping[int, Position],
        *,
        prefix: bool,
        own: bool,
        mask_kwarg: str | None = None,
    ) -> None:
        self.model, self.prefix, self.own, self.mask_kwarg = model, prefix, own, mask_kwarg
        self.places = dict(sorted(places.items()))
        self.depths = list(self.places)
        self.named: list[str] | None = None
        """The names of the modules that are read, if the user chose them."""
        self.reads_with_holes: bool | None = None  # of an augment with its own tokenizer, once it is known
        self.has_cache = has_cache(model)
        """Whether the hidden states of new tokens can be computed from those and a cache."""
        self.taps = {depth: Tap(layers[depth - 1].site(at)) for depth, at in self.places.items()}

    @property
    def site(self) -> str:
        """What is read of the model, as a text that tells stored hidden states apart."""
        positions = list(dict.fromkeys(self.places.values()))
        where = f"{self.depths} {positions[0] if len(positions) == 1 else list(self.places.values())}"
        return where if self.named is None else f"{where} {self.named}"

    def input_mask(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the mask that the model gets: none if it is over hidden states and not over the model's input."""
        over_states = mask is not None and self.prefix and self.mask_kwarg is None and mask.shape != tokens.shape[:2]
        return None if over_states else mask

    def read(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        *,
        unpadded: Unpadded | None = None,
    ) -> dict[int, Tensor]:
        """Run the model up to the last layer that is read.

        Args:
            tokens: (B, M) token ids, or another input that the model takes.
            mask: (B, M) bool, true at real tokens. With a cache, it also covers the cached columns. None if all are real.
            positions: (M,) or (B, M) int64, or None for the model's default.
            cache: The model's cache, extended in place, or None.
            unpadded: The T tokens of rows without padding, for a model with ``unpadded_hidden``. They take the place of the
                other arguments.

        Returns:
            The hidden states (B, M, A) of each layer that is read, by layer number. Without padding they are (1, T, A).

        Raises:
            ValueError: If the model did not run one of the layers.
        """
        states: dict[int, Tensor] = {}
        # An exception would skip the hooks that free the gathered parameters of a sharded model.
        stops_early = not is_sharded(self.model)

        def keep(depth: int) -> Callable[[Tensor], None]:
            def visit(hidden: Tensor) -> None:
                # Without gradients, a model may overwrite this state in place in the next layer. So keep a copy.
                states[depth] = (hidden if hidden.ndim > 2 else hidden[None]).detach().clone()
                if stops_early and len(states) == len(self.taps):
                    raise _StopReading

            return visit

        with torch.no_grad(), visiting({tap: keep(depth) for depth, tap in self.taps.items()}):
            try:
                if unpadded is not None:
                    self.model.unpadded_hidden(unpadded)  # type: ignore[operator]
                else:
                    mask = self.input_mask(tokens, mask)
                    run_model(self.model, tokens, mask=mask, positions=positions, cache=cache, mask_kwarg=self.mask_kwarg)
            except _StopReading:
                if hasattr(cache, "advance"):
                    cache.advance(tokens.shape[1])
                elif cache is not None:  # of a model that is not of this package
                    cache.length += tokens.shape[1]
        if missing := [depth for depth in self.depths if depth not in states]:
            raise ValueError(
                f"The augment {type(self.model).__name__} did not run its layers {missing}. Do not use a composition after "
                "`release`, and compile a model only after composing it."
            )
        return states


def run_model(
    model: nn.Module,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Any = None,
    mask_kwarg: str | None = None,
) -> Any:
    """Call a model with those of mask, positions and cache that it accepts.

    Args:
        model: The model.
        tokens: (B, M) token ids, or another input that the model takes.
        mask: (B, M) bool, true at real tokens. None if all are real.
        positions: (M,) or (B, M) int64. Only models with the method `hidden` get them.
        cache: The model's cache. Only models with the method `hidden` get it.
        mask_kwarg: The name of the argument with which the model takes its mask. None to find it. Only for models without the
            method `hidden`.

    Returns:
        The output of the model. For a model with the method `hidden`, these are the hidden states.

    Raises:
        ValueError: If the input contains padding and the model accepts no mask.
    """
    if has_hidden(model):
        return model.hidden(tokens, mask=mask, positions=positions, cache=cache)
    return model(tokens, **mask_argument(model, mask, mask_kwarg))


def mask_argument(model: nn.Module, mask: Tensor | None, mask_kwarg: str | None = None) -> dict[str, Tensor]:
    """Return the mask as the argument with which a model takes it, or nothing if all tokens are real and it takes none.

    Args:
        model: The model.
        mask: (B, M) bool, true at real tokens. None if all are real.
        mask_kwarg: The name of the argument. None to find it. Masks that end with ``key_padding_mask`` are true at pads, as in
            torch.

    Raises:
        ValueError: If the input contains padding and the model accepts no mask.
    """
    if mask is None:
        return {}
    if mask_kwarg is not None:
        return {mask_kwarg: ~mask if mask_kwarg.endswith("key_padding_mask") else mask}
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted:
        return {"attention_mask": mask.long()}
    if "mask" in accepted:
        return {"mask": mask}
    if not bool(mask.all()):
        raise ValueError(
            f"{type(model).__name__} accepts no mask, but its input contains padding. Pass rows of equal length, add a "
            "`mask` argument to its forward method, or name its argument with `mask_kwarg`."
        )
    return {}
