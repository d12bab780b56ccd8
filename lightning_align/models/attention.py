"""Multi-query attention: the mask, the padded, packed and cached layouts, and the key-value cache.

All layouts call ``scaled_dot_product_attention``. They differ only in where they keep past keys and how they handle padding.
Shapes: ``q`` is (..., H, K). ``k`` and ``v`` are (..., K), since there is one key and one value head (Shazeer 2019,
arXiv 1911.02150).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lightning_align.models.sdpa import dot_product_attention
from lightning_align.models.static_cache import StaticKV, single_query


class Attend(Protocol):
    """The attention of one layer. It returns its output in the layout of the queries."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """Compute the attention output: (..., H, K), (..., K), (..., K) -> (..., H, K)."""
        ...


def attention_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the products with a weight: that of autocast if it is on, or else that of the weight."""
    device = weight.device.type
    on = weight.dtype is torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else weight.dtype


def attention_mask(mask: Tensor, num_queries: int, *, causal: bool) -> Tensor:
    """Build the mask of which query may attend to which key.

    Args:
        mask: (B, M) bool, true at keys that exist, or (B, N, M) bool, true where a query may attend to a key.
        num_queries: The number of queries N. The queries are the last N of the M columns.
        causal: Whether to hide later columns from each query.

    Returns:
        (B, 1, N, M) bool, true where attention is allowed. Each query may attend to at least one key.
    """
    allowed = mask[:, None, :] if mask.ndim == 2 else mask
    num_keys = mask.shape[-1]
    queries = torch.arange(num_keys - num_queries, num_keys, device=mask.device)[:, None]
    keys = torch.arange(num_keys, device=mask.device)[None, :]
    if causal:
        allowed = allowed & (keys <= queries)
    # For a query without any visible key (a pad on the left) the softmax over nothing would give NaN. Then 0 * NaN would
    # spread to every row that ignores this query. So it may attend to itself. Its output is not used.
    diagonal = keys == queries
    fallback = diagonal if mask.ndim == 2 else diagonal & ~allowed.any(dim=-1, keepdim=True)
    return (allowed | fallback).unsqueeze(1)


def _mix(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    """Compute the attention output: (B, N, H, K), (B, M, K), (B, M, K) -> (B, N, H, K)."""
    if q.shape[1] == 1 and not causal:
        return single_query(q, k, v, mask=mask, scale=scale, dropout=dropout)
    # Expand the one key head (a view with stride 0). enable_gqa would be slower on CPU.
    k, v = (t.unsqueeze(1).expand(-1, q.shape[2], -1, -1) for t in (k, v))
    out = dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


@dataclass
class PaddedAttention:
    """Attention over padded rows (B, N, ...).

    Args:
        causal: Whether to hide later positions from each position. Used only without a mask.
        mask: (B, 1, N, N) from `attention_mask`, with causality included. None if only `causal` restricts attention.
    """

    causal: bool
    mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """See `Attend`."""
        causal = self.causal and self.mask is None
        return _mix(q, k, v, mask=self.mask, causal=causal, scale=scale, dropout=dropout)


@dataclass
class PackedAttention:
    """Attention over rows without their padding. Everything except attention itself works on (T, ...).

    On CPU, the cost of a matrix product is proportional to its rows, and 30 to 40 % of a preference batch is padding.

    Args:
        where: (T,) the index of each real token in the padded rows of all groups, one group after the other.
        groups: The shape (rows, columns) of each group of rows, padded on the right.
    """

    where: Tensor
    groups: Sequence[tuple[int, int]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """See `Attend`. The padding is on the right, so causality alone hides it."""
        parts = zip(self._pad(q), self._pad(k), self._pad(v), strict=True)
        mixed = [_mix(*part, mask=None, causal=True, scale=scale, dropout=dropout).flatten(0, 1) for part in parts]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).index_select(0, self.where)

    def _pad(self, x: Tensor) -> list[Tensor]:
        sizes = [rows * columns for rows, columns in self.groups]
        padded = x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, self.where, x)
        parts = [padded] if len(sizes) == 1 else padded.split(sizes)
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.groups, strict=True)]


@dataclass
class KVCache:
    """A preallocated key-value cache. ``keys[layer]`` and ``values[layer]`` are (B, S, K).

    All rows write to the same column, so prompts of different lengths must be padded on the left.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = field(default=0)
    """The number of filled columns."""

    @property
    def capacity(self) -> int:
        """The number of columns S, filled or not."""
        return self.keys[0].shape[1]

    def attend(self, layer: int, mask: Tensor | None) -> "CachedAttention":
        """Return the attention of a layer. See `CachedAttention`."""
        return CachedAttention(self, layer, mask)

    def advance(self, new: int) -> None:
        """Count new columns as filled, which every layer has written."""
        self.length += new

    def rewind(self, count: int) -> None:
        """Drop the last columns."""
        self.length -= count

    def static(self, batch: int, length: int) -> StaticKV:
        """Make an empty cache of fixed size, of the same model. See `lightning_align.models.static_cache`."""
        return StaticKV(self, batch, length)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, (B',) int64, in this order. A repeated row is copied. Only filled columns are copied."""

        def selected(old: Tensor) -> Tensor:
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, : self.length] = old[:, : self.length].index_select(0, rows)
            return new

        self.keys, self.values = [selected(keys) for keys in self.keys], [selected(values) for values in self.values]

    def repeat(self, starts: Tensor, capacity: int) -> "KVCache":
        """Return a cache with a copy of the only row of this one for each start.

        Args:
            starts: (B,) int64, the number of columns by which each copy is shifted to the right. The columns that are shifted
                out are lost. A mask must hide those before the start.
            capacity: The number of columns of the new cache.
        """
        shifted = (torch.arange(self.length, device=starts.device) - starts[:, None]).clamp(min=0)

        def repeated(old: Tensor) -> Tensor:
            new = old.new_empty(len(starts), capacity, *old.shape[2:])
            new[:, : self.length] = old[0, shifted]
            return new

        return KVCache([repeated(keys) for keys in self.keys], [repeated(values) for values in self.values], self.length)

    def join(self, other: "KVCache", *, columns: int, capacity: int) -> None:
        """Append the rows of another cache. The last columns of both become the last of the new filled columns.

        Args:
            other: The cache of the new rows, (B', S', K).
            columns: The number of filled columns from now on. Older columns of either cache are dropped. Missing columns are
                zero, and a mask must hide them.
            capacity: The number of columns from now on.
        """

        def joined(old: Tensor, new: Tensor) -> Tensor:
            out = old.new_empty(len(old) + len(new), capacity, *old.shape[2:])
            for part, cached, length in ((out[: len(old)], old, self.length), (out[len(old) :], new, other.length)):
                kept = min(length, columns)
                part[:, : columns - kept] = 0
                part[:, columns - kept : columns] = cached[:, length - kept : length]
            return out

        self.keys = [joined(old, new) for old, new in zip(self.keys, other.keys, strict=True)]
        self.values = [joined(old, new) for old, new in zip(self.values, other.values, strict=True)]
        self.length = columns


@dataclass
class CachedAttention:
    """Attention of one layer over the cached and the new columns.

    Args:
        cache: The cache to extend in place. The model itself advances its ``length``, after the last layer.
        layer: The index of this layer in the cache.
        mask: (B, 1, N, length + N) from `attention_mask`. None if every query may attend to every column up to its own: for
            the first columns of all rows, or for one new column.
    """

    cache: KVCache
    layer: int
    mask: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """See `Attend`."""
        start, stop = self.cache.length, self.cache.length + k.shape[1]
        if stop > self.cache.capacity:
            raise ValueError(
                f"The key-value cache must have at least {stop} columns, but has {self.cache.capacity}. Pass a larger `length` "
                "to `make_cache`."
            )
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        keys[:, start:stop], values[:, start:stop] = k, v
        keys, values = keys[:, :stop], values[:, :stop]
        if torch.is_autocast_enabled(q.device.type):
            q = q.to(keys.dtype)  # casting the whole cache for each token would cost more than attention
        else:
            keys, values = keys.to(q.dtype), values.to(q.dtype)
        # Without a mask a GPU has faster kernels. They count queries from the first column, so no column may be cached.
        causal = self.mask is None and start == 0 and q.shape[1] > 1
        return _mix(q, keys, values, mask=self.mask, causal=causal, scale=scale, dropout=dropout)
