"""Key-value caches of transformers, and the check that decoding with them is right."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.models.parallelize import uncompiled
from lightning_align.runtime.modes import evaluating

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The largest difference between cached and plain logits that counts as rounding, in standard deviations of the logits."""
COARSE = 0.1
"""The same for dtypes with fewer bits."""

_faults: "WeakKeyDictionary[nn.Module, str | None]" = WeakKeyDictionary()
"""What `continuation_fault` has found."""


class PretrainedCache:
    """A key-value cache of transformers, with the interface of `KVCache` that decoding needs."""

    def __init__(
        self,
        past: Any,
        *,
        static: Callable[[], Callable[..., Any] | None] = lambda: None,
        extends: Callable[[], bool] = lambda: True,
    ) -> None:
        """Wrap a cache.

        Args:
            past: A cache of transformers.
            static: What returns the class of the static form, or None if the model cannot be decoded with it.
            extends: What returns whether the model reads several tokens after cached ones as it reads them at once.
        """
        self.past = past
        self._extends = extends
        self.length = 0
        """The number of filled columns."""
        self._static = static
        if not _joins(past):
            self.join = None  # type: ignore[method-assign,assignment]

    @property
    def static(self) -> Callable[[int, int], Any] | None:
        """A function that makes an empty cache of fixed size. See `lightning_align.models.static_cache`."""
        static = self._static()
        return None if static is None else partial(static, self)

    def advance(self, new: int) -> None:
        """Count new columns as filled, which every layer has written."""
        self.length += new

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, (B',) int64, in this order. A repeated row is copied."""
        self.past.batch_select_indices(rows)

    @property
    def rewind(self) -> "Callable[[int], None] | None":
        """A function that drops the last columns, see `KVCache.rewind`. None if a layer drops columns by itself."""
        return self._rewind if _keeps_all(self.past) and self._extends() else None

    def _rewind(self, count: int) -> None:
        self.length -= count
        for layer in self.past.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]

    @property
    def repeat(self) -> "Callable[[Tensor, int], PretrainedCache] | None":
        """A function that copies the only row, see `KVCache.repeat`. None if a layer has not kept all columns."""
        layers = [layer for layer in self.past.layers if layer.is_initialized]
        whole = _joins(self.past) and all(layer.keys.shape[2] == self.length for layer in layers)
        return self._repeat if whole and self._extends() else None

    def _repeat(self, starts: Tensor, capacity: int) -> "PretrainedCache":
        shifted = (torch.arange(self.length, device=starts.device) - starts[:, None]).clamp(min=0)
        new = PretrainedCache(copy.deepcopy(self.past), static=self._static, extends=self._extends)
        for layer in new.past.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (states[0][:, shifted].transpose(0, 1) for states in (layer.keys, layer.values))
        new.length = self.length
        return new

    def join(self, other: "PretrainedCache", *, columns: int, capacity: int) -> None:
        """Append the rows of another cache. See `KVCache.join`. A cache of transformers grows by itself, without `capacity`."""
        for layer, added in zip(self.past.layers, other.past.layers, strict=True):
            if not layer.is_initialized:  # a layer that uses the keys of another one
                continue
            width = columns
            if layer.is_sliding:
                width = min(columns, layer.sliding_window - 1)
                layer.cumulative_length = columns
            layer.keys = torch.cat((_newest(layer.keys, width), _newest(added.keys, width)))
            layer.values = torch.cat((_newest(layer.values, width), _newest(added.values, width)))
        self.length = columns


def _newest(states: Tensor, width: int) -> Tensor:
    """Return the last columns of (B, H, S, K) states. Missing columns are zero."""
    states = states[:, :, max(0, states.shape[2] - width) :]
    return F.pad(states, (0, 0, width - states.shape[2], 0))


def _joins(past: Any) -> bool:
    """Return whether a cache contains only keys and values per column, so that columns can be dropped and added."""
    from transformers import cache_utils

    return all(type(layer) in (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer) for layer in past.layers)


def _keeps_all(past: Any) -> bool:
    """Return whether all layers of a cache keep the keys and values of all columns."""
    from transformers import cache_utils

    return all(type(layer) is cache_utils.DynamicLayer for layer in past.layers)


def has_selectable_layers(config: Any) -> bool:
    """Return whether the cache of a model contains only keys and values per column, so that rows can be selected.

    Recurrent models keep a state instead, or next to keys and values. Selecting rows does not select the state.

    Args:
        config: The configuration of the model.
    """
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers
    return all(
        hasattr(layer, "batch_select_indices") and not hasattr(layer, "recurrent_states") and not hasattr(layer, "conv_states")
        for layer in layers
    )


def cache_fault(model: Any) -> str | None:
    """Find out whether decoding with the cache of a `PretrainedLM` gives other logits than decoding without it.

    Prompts of two lengths are padded on the left and read, rows are chosen, and a token is appended, as the sampler does.

    Args:
        model: The model. Its mode is not changed.

    Returns:
        What is wrong, or None.
    """
    weight = model.model.get_output_embeddings().weight
    try:
        with evaluating(model), torch.autocast(weight.device.type, enabled=False), uncompiled(model):
            return _compare(model, weight)
    except Exception as error:  # models raise many types here, and each of them means that the cache cannot be used
        return _summary(error)


def continuation_fault(model: Any) -> str | None:
    """Find out whether a `PretrainedLM` gives other logits if several tokens are read after a cached common prefix.

    Args:
        model: The model. Its mode is not changed.

    Returns:
        What is wrong, or None.
    """
    if model not in _faults:
        weight = model.model.get_output_embeddings().weight
        try:
            with evaluating(model), torch.autocast(weight.device.type, enabled=False), uncompiled(model):
                _faults[model] = _compare_continuation(model, weight)
        except Exception as error:  # as in `cache_fault`
            _faults[model] = _summary(error)
    return _faults[model]


def _summary(error: Exception) -> str:
    summary = str(error).splitlines()[0][:120] if str(error) else ""
    return f"{type(error).__name__}: {summary}"


def _compare_continuation(model: Any, weight: Tensor) -> str | None:
    device, size = weight.device, weight.shape[0]
    ids = [(index + 1) * (size - 1) // 11 for index in range(10)]
    prefix, prompts = ids[:3], [ids[:7], [*ids[:3], *ids[8:]]]
    cache = model.new_cache()
    model.hidden(torch.tensor([prefix], device=device), cache=cache)
    width, new = 7, 7 - len(prefix)
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    cache = cache._repeat(starts, width)
    columns = torch.arange(width, device=device)
    exists, positions = columns >= starts[:, None], (columns - starts[:, None]).clamp(min=0)
    tokens = torch.tensor([prompt[-new:] for prompt in prompts], device=device)
    hidden = model.hidden(tokens, mask=exists, positions=positions[:, -new:], cache=cache)
    return _difference(model, last_states(model, prompts, device), hidden[:, -1])


def _compare(model: Any, weight: Tensor) -> str | None:
    """Return how the logits with the cache differ from those without it, or None if only by rounding."""
    device, size = weight.device, weight.shape[0]
    ids = [(index + 1) * (size - 1) // 9 for index in range(8)]
    prompts, following = [ids[:6], ids[3:5]], [ids[6], ids[7]]
    chosen = [1, 0, 1]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None]
    columns = torch.arange(width + 1, device=device)
    exists, positions = columns >= starts, (columns - starts).clamp(min=0)
    cache = model.new_cache()
    hidden = model.hidden(padded, mask=exists[:, :width], positions=positions[:, :width], cache=cache)
    found = [hidden[:, -1]]
    rows = torch.tensor(chosen, device=device)
    cache.select(rows)
    token = torch.tensor([[following[row]] for row in chosen], device=device)
    hidden = model.hidden(token, mask=exists[rows], positions=positions[rows, width:], cache=cache)
    found.append(hidden[:, -1])
    expected = [last_states(model, prompts, device)]
    expected.append(last_states(model, [[*prompts[row], following[row]] for row in chosen], device))
    return _difference(model, torch.cat(expected), torch.cat(found))


def _difference(model: Any, expected: Tensor, found: Tensor) -> str | None:
    """Return how the logits of hidden states (B, D) differ from the expected ones, or None if only by rounding."""
    right, cached = (model.head.logits(states).double() for states in (expected, found))
    limit = max(TOLERANCE.get(parameter.dtype, COARSE) for parameter in model.parameters() if parameter.is_floating_point())
    difference = float((right - cached).abs().max() / right.std().clamp(min=1e-30))
    return None if difference <= limit else f"the logits differ by {difference:.1e} of their standard deviation"


def last_states(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the hidden state of the last token of each prompt (B, D), each read alone and without a cache."""
    states = [model.hidden(torch.tensor([list(prompt)], device=device))[:, -1] for prompt in prompts]  # type: ignore[operator]
    return torch.cat(states)
