"""Attention for multi-query models: masks, the padded and the packed layout, and the key-value cache.

All three run through ``scaled_dot_product_attention``; they differ only in where the past and the padding are.
Shapes: ``q`` (..., H, K), ``k`` and ``v`` (..., K): one key and one value head (Shazeer 2019, arXiv 1911.02150).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Attention of one layer: queries, keys and values in, mixed values out, in the layout that the queries came in."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """Mix: (..., H, K), (..., K), (..., K) -> (..., H, K)."""
        ...


def attention_mask(mask: Tensor, num_queries: int, *, causal: bool) -> Tensor:
    """Which query may see which key.

    Args:
        mask: (B, M) bool, true at keys that exist; or (B, N, M) bool, which query may see which key.
        num_queries: N; the queries are the last N of the M columns.
        causal: whether a query sees no later column.

    Returns:
        (B, 1, N, M) bool.
    """
    allowed = mask[:, None, :] if mask.ndim == 2 else mask
    num_keys = mask.shape[-1]
    queries = torch.arange(num_keys - num_queries, num_keys, device=mask.device)[:, None]
    keys = torch.arange(num_keys, device=mask.device)[None, :]
    if causal:
        allowed = allowed & (keys <= queries)
    # A query that sees nothing (a pad on the left) would be a softmax over nothing: NaN, which 0 * NaN then spreads to
    # every row that ignores it. It may see itself; nobody reads the result.
    itself = keys == queries
    blind = itself if mask.ndim == 2 else itself & ~allowed.any(dim=-1, keepdim=True)
    return (allowed | blind).unsqueeze(1)


def _mix(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    """(B, N, H, K), (B, M, K), (B, M, K) -> (B, N, H, K)."""
    if q.shape[1] == 1 and not causal:
        # One query of each head, and one key head: as well H queries of one head, for which keys are read once, not H times.
        return F.scaled_dot_product_attention(q, k.unsqueeze(1), v.unsqueeze(1), attn_mask=mask, dropout_p=dropout, scale=scale)
    # The one key head is expanded (a view, stride 0) rather than passed with enable_gqa, which is slower on CPU.
    k, v = (t.unsqueeze(1).expand(-1, q.shape[2], -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)


@dataclass
class PaddedAttention:
    """Attention over padded rows (B, N, ...).

    Args:
        causal: whether a position sees no later one.
        mask: (B, 1, N, N) from `attention_mask`, or None where no mask is needed beyond causality.
    """

    causal: bool
    mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """See `Attend`."""
        causal = self.causal and self.mask is None
        return _mix(q, k, v, mask=self.mask, causal=causal, scale=scale, dropout=dropout)


@dataclass
class PackedAttention:
    """Attention over right-padded rows whose pads were left out: everything but attention itself works on (T, ...).

    On CPU a matrix product costs what its rows cost, and preference batches are 30 to 40 % padding.

    Args:
        where: (T,) flat index into B * N of every real token.
        shape: (B, N).
    """

    where: Tensor
    shape: tuple[int, int]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """See `Attend`. Pads stand on the right, so causality alone keeps them out."""
        q, k, v = (self._pad(t) for t in (q, k, v))
        out = _mix(q, k, v, mask=None, causal=True, scale=scale, dropout=dropout)
        return out.flatten(0, 1).index_select(0, self.where)

    def _pad(self, x: Tensor) -> Tensor:
        rows, columns = self.shape
        padded = x.new_zeros(rows * columns, *x.shape[1:])
        return padded.index_copy(0, self.where, x).view(rows, columns, *x.shape[1:])


@dataclass
class KVCache:
    """Keys and values of the past, preallocated: ``keys[layer]`` and ``values[layer]`` are (B, S, K).

    Every row writes the same column, so a batch of prompts of unequal lengths is padded on the left.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = field(default=0)
    """Columns that are filled."""

    @property
    def capacity(self) -> int:
        """Columns that there are."""
        return self.keys[0].shape[1]

    def select(self, rows: Tensor) -> None:
        """Keep these rows (B',) int64, in this order; a row that is named twice is copied. Moves the filled columns alone."""

        def chosen(old: Tensor) -> Tensor:
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, : self.length] = old[:, : self.length].index_select(0, rows)
            return new

        self.keys, self.values = [chosen(keys) for keys in self.keys], [chosen(values) for values in self.values]


@dataclass
class CachedAttention:
    """Attention of one layer over the cache and the new columns.

    Args:
        cache: written in place; its ``length`` is advanced by the model, after the last layer.
        layer: index of this layer in the cache.
        mask: (B, 1, N, length + N).
    """

    cache: KVCache
    layer: int
    mask: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """See `Attend`."""
        start, stop = self.cache.length, self.cache.length + k.shape[1]
        if stop > self.cache.capacity:
            raise ValueError(
                f"the key-value cache holds {self.cache.capacity} columns and {stop} are needed: "
                "make it longer with make_cache(batch, length)"
            )
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        keys[:, start:stop], values[:, start:stop] = k, v
        keys, values = keys[:, :stop].to(q.dtype), values[:, :stop].to(q.dtype)
        return _mix(q, keys, values, mask=self.mask, causal=False, scale=scale, dropout=dropout)
