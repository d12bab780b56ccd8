"""The common beginning of prompts, such as a system message, which is read once for all of them."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_align.models.language_model import has_cache
from lightning_align.runtime.transfer import to_device

LEAST = 8
"""The smallest number of common tokens that are read apart. Fewer cost more in a pass of their own than they save."""


class Prefix(NamedTuple):
    """The tokens that all prompts begin with, and what the model keeps of them."""

    tokens: list[int]
    cache: Any
    """A key-value cache of one row, in which each column is filled. It is not changed."""

    def repeat(self, starts: Tensor, capacity: int) -> Any:
        """Return a cache with a row for each start (B,), in which the prefix begins. See `KVCache.repeat`."""
        return self.cache.repeat(starts, capacity)


def read_prefix(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> Prefix | None:
    """Read the tokens that all prompts begin with.

    Args:
        model: Any language model. Its weights must not change as long as the prefix is used.
        prompts: The token ids of each prompt.
        device: The device of the model.

    Returns:
        The prefix, which is shorter than every prompt. None if it has fewer than `LEAST` tokens, if there is one prompt, or if
        the cache of the model cannot be repeated, as that of a recurrent model or of a sliding window that is full.
    """
    if len(prompts) < 2 or not has_cache(model):
        return None
    # All prompts begin with what the first and the last one in order begin with.
    first, last = min(prompts, key=list), max(prompts, key=list)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    length = min(common, min(map(len, prompts)) - 1)
    if length < LEAST:
        return None
    tokens = list(first[:length])
    cache = model.make_cache(1, length)
    if not hasattr(cache, "repeat"):
        return None
    model.hidden(to_device([tokens], device), cache=cache)
    return Prefix(tokens, cache) if cache.repeat is not None else None
