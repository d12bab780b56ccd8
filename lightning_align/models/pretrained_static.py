"""The static form of a key-value cache of transformers, and the check that decoding with it is right.

The static cache of transformers writes the same column in all rows. Rows of different lengths then need padding on the left,
and new rows cannot take the place of ended ones. Here each row has its own column, as in `StaticKV`.
"""

from functools import cache as remembered
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_align.models.parallelize import uncompiled
from lightning_align.models.pretrained_cache import COARSE, TOLERANCE, PretrainedCache, last_states
from lightning_align.models.static_cache import Buffers, write
from lightning_align.runtime.modes import evaluating

_faults: "WeakKeyDictionary[nn.Module, str | None]" = WeakKeyDictionary()


class StaticPretrained:
    """The static form of a `PretrainedCache`. See `lightning_align.models.static_cache`.

    Args:
        cache: A cache of prompts, of which every layer has keys and values (B, H, S, K).
        batch: The number of rows.
        length: The number of columns.
    """

    def __init__(self, cache: PretrainedCache, batch: int, length: int) -> None:
        self._depth = len(cache.past.layers)
        self._buffers = Buffers(_parts(cache), batch, length)
        self.select, self.resize = self._buffers.select, self._buffers.resize

    def insert(self, cache: PretrainedCache, first: int, copies: int) -> None:
        """See `StaticCache.insert`."""
        self._buffers.insert(_parts(cache), cache.length, first, copies)

    def step(self, columns: Tensor, width: int) -> "StepPretrained":
        """See `StaticCache.step`."""
        from transformers.cache_utils import Cache

        views = self._buffers.views(len(columns), width)
        pairs = zip(views[: self._depth], views[self._depth :], strict=True)
        return StepPretrained(Cache(layers=[_row_layer()(keys, values, columns) for keys, values in pairs]))


class StepPretrained:
    """The cache of a step of `StaticPretrained`."""

    length = 0

    def __init__(self, past: Any) -> None:
        self.past = past

    def advance(self, new: int) -> None:
        """Do nothing: the caller advances the columns of the rows."""


def _parts(cache: PretrainedCache) -> list[Tensor]:
    layers = cache.past.layers
    return [layer.keys for layer in layers] + [layer.values for layer in layers]


@remembered
def _row_layer() -> Any:
    """Return the class of a layer of transformers with a column per row. It is made when transformers is there."""
    from transformers.cache_utils import DynamicLayer

    class RowLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
        """One layer of keys and values (B, H, S, K)."""

        _layer_type = None  # it is not what transformers makes by itself

        def __init__(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.columns = keys, values, columns
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            write(self.keys, self.columns, key_states)
            write(self.values, self.columns, value_states)
            if torch.is_autocast_enabled(key_states.device.type):
                return self.keys, self.values
            return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.keys.shape[-2], 0

        def get_seq_length(self) -> int:
            return 0

    return RowLayer


def static_form(model: nn.Module) -> type[StaticPretrained] | None:
    """Return the class of the static cache of a `PretrainedLM`, or None if decoding with it would be wrong.

    This is found out when it is first wanted, by reading a few tokens. The model then decodes with a cache that grows.

    Args:
        model: The model.
    """
    if model not in _faults:
        _faults[model] = static_fault(model)
    return None if _faults[model] is not None else StaticPretrained


def static_fault(model: Any) -> str | None:
    """Find out whether decoding with a static cache gives other logits than decoding without a cache.

    Args:
        model: A `PretrainedLM` that can be decoded with a cache. Its mode is not changed.

    Returns:
        What is wrong or missing, or None.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if model.config._attn_implementation != "sdpa":
        return f"the attention is {model.config._attn_implementation!r}"  # others take masks of another form
    layers = DynamicCache(config=model.config).layers
    if not layers or not all(type(layer) is DynamicLayer for layer in layers):
        return "the cache is not keys and values of all columns"
    weight = model.model.get_output_embeddings().weight
    try:
        with evaluating(model), torch.autocast(weight.device.type, enabled=False), uncompiled(model):
            return _compare(model, weight)
    except Exception as error:  # models raise many types here, and each of them means that the cache cannot be used
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def _compare(model: nn.Module, weight: Tensor) -> str | None:
    """Read prompts of two lengths, padded on the right, append two tokens to each, and compare the logits."""
    lm: Any = model
    device, size = weight.device, weight.shape[0]
    ids = [(index + 1) * (size - 1) // 11 for index in range(10)]
    prompts, following = [ids[:5], ids[3:5]], [ids[5:7], ids[7:9]]
    lengths = torch.tensor([5, 2], device=device)
    tokens = torch.tensor([prompts[0], [*prompts[1], 0, 0, 0]], device=device)
    usual = lm.new_cache()
    hidden = lm.hidden(tokens, positions=torch.arange(5, device=device), cache=usual)
    found = [hidden[torch.arange(2, device=device), lengths - 1]]
    static = StaticPretrained(usual, 3, 8)
    static.insert(usual, 0, 1)
    expected = [last_states(lm, prompts, device)]
    for place in range(2):
        columns = lengths + place
        mask = torch.arange(8, device=device) <= columns[:, None]
        new = torch.tensor([[row[place]] for row in following], device=device)
        options = {"mask": mask[:, None, None], "positions": columns[:, None], "cache": static.step(columns, 8)}
        found.append(lm.hidden(new, **options)[:, -1])
        grown = [prompt + row[: place + 1] for prompt, row in zip(prompts, following, strict=True)]
        expected.append(last_states(lm, grown, device))
    right, cached = (lm.head.logits(torch.cat(parts)).double() for parts in (expected, found))
    limit = max(TOLERANCE.get(parameter.dtype, COARSE) for parameter in model.parameters() if parameter.is_floating_point())
    difference = float((right - cached).abs().max() / right.std().clamp(min=1e-30))
    return None if difference <= limit else f"the logits differ by {difference:.1e} of their standard deviation"
