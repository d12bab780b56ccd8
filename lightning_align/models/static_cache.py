"""Key-value caches of a fixed size, with which each decoding step runs the same operators on the same memory.

A cache that grows changes the shapes of a step with each token. Such a step cannot be captured as a CUDA graph, and
`torch.compile` compiles it again. A static cache keeps the keys and values of all rows in buffers that are allocated once. A
row begins in column 0, and each row writes its next token into a column of its own, which a tensor says. Rows therefore need
no padding on the left, and ended rows can make room for new ones.

A cache of a model makes its static form with the method ``static(batch, length)``:

- ``insert(cache, first, copies)`` copies the columns of prompts that were read with the usual cache.
- ``select(rows, columns)`` keeps some rows and moves them to the front, in the same memory.
- ``resize(batch, length)`` allocates other buffers and copies what is in the present ones.
- ``step(columns, width)`` returns what the model's ``hidden`` takes as ``cache`` to append a token to the first rows.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def single_query(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Compute the attention output of one position: (B, 1, H, K), (B, M, K), (B, M, K) -> (B, 1, H, K).

    With one position and one key head, the H heads can be treated as H queries of one head. The keys are then read once
    instead of H times.
    """
    return F.scaled_dot_product_attention(q, k.unsqueeze(1), v.unsqueeze(1), attn_mask=mask, dropout_p=dropout, scale=scale)


class KeysValues(Protocol):
    """The tensors of a `KVCache`, (B, S, K) per layer, of which the first `length` columns are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int


class StaticCache(Protocol):
    """The buffers of all rows."""

    def insert(self, cache: Any, first: int, copies: int) -> None:
        """Copy prompts that were read with a usual cache.

        Args:
            cache: The usual cache of the model, whose rows begin in column 0.
            first: The row of the first copy of the first prompt.
            copies: The number of rows per prompt.
        """
        ...

    def select(self, rows: Tensor, columns: int) -> None:
        """Move the given rows, (B',) int64, to the front. At most `columns` columns of a row are filled."""
        ...

    def resize(self, batch: int, length: int) -> None:
        """Make room for rows and columns. Rows and columns that exist are kept."""
        ...

    def step(self, columns: Tensor, width: int) -> Any:
        """Return the ``cache`` of a forward pass of one token per row.

        Args:
            columns: (B,) int64, the column of the new token of each of the first B rows. It is read in each forward pass.
            width: The number of columns that the step reads, more than any of `columns`.
        """
        ...


class Buffers:
    """Tensors (B, ..., S, K) with the columns S of all rows, of which all but the filled ones are finite and masked.

    Args:
        like: Tensors (B', ..., S', K) of another cache, for the other sizes, the dtype and the device.
        batch: The number of rows B.
        length: The number of columns S.
    """

    def __init__(self, like: Sequence[Tensor], batch: int, length: int) -> None:
        # Zeros, because a mask cannot hide NaN from a product with 0.
        self.tensors = [part.new_zeros(batch, *part.shape[1:-2], length, part.shape[-1]) for part in like]

    def insert(self, parts: Sequence[Tensor], width: int, first: int, copies: int) -> None:
        """Copy the first `width` columns of other tensors. See `StaticCache.insert`."""
        for buffer, part in zip(self.tensors, parts, strict=True):
            rows = buffer[first : first + len(part) * copies, ..., :width, :].unflatten(0, (len(part), copies))
            rows.copy_(part[..., :width, :].unsqueeze(1))

    def select(self, rows: Tensor, columns: int) -> None:
        """See `StaticCache.select`."""
        for buffer in self.tensors:
            filled = buffer[..., :columns, :]
            filled[: len(rows)] = filled.index_select(0, rows)

    def resize(self, batch: int, length: int) -> None:
        """See `StaticCache.resize`."""
        old, self.tensors = self.tensors, Buffers(self.tensors, batch, length).tensors
        for source, target in zip(old, self.tensors, strict=True):
            rows, columns = min(len(source), batch), min(source.shape[-2], length)
            target[:rows, ..., :columns, :] = source[:rows, ..., :columns, :]

    def views(self, rows: int, width: int) -> list[Tensor]:
        """Return the first rows and columns of each tensor, in the same memory."""
        return [buffer[:rows, ..., :width, :] for buffer in self.tensors]


def write(buffer: Tensor, columns: Tensor, new: Tensor) -> None:
    """Write one column per row.

    Args:
        buffer: (B, ..., S, K), changed in place.
        columns: (B,) int64, the column of each row.
        new: (B, ..., 1, K).
    """
    at = columns.view(-1, *[1] * (buffer.ndim - 1)).expand_as(new)
    buffer.scatter_(-2, at, new.to(buffer.dtype))


class StaticKV:
    """The static form of a `KVCache`.

    Args:
        cache: A `KVCache` of the model.
        batch: The number of rows.
        length: The number of columns.
    """

    def __init__(self, cache: KeysValues, batch: int, length: int) -> None:
        self._depth = len(cache.keys)
        self._buffers = Buffers([*cache.keys, *cache.values], batch, length)
        self.select, self.resize = self._buffers.select, self._buffers.resize

    def insert(self, cache: KeysValues, first: int, copies: int) -> None:
        """See `StaticCache.insert`."""
        self._buffers.insert([*cache.keys, *cache.values], cache.length, first, copies)

    def step(self, columns: Tensor, width: int) -> "StepKV":
        """See `StaticCache.step`."""
        views = self._buffers.views(len(columns), width)
        return StepKV(views[: self._depth], views[self._depth :], columns)


class StepKV:
    """The cache of a step of `StaticKV`. ``keys[layer]`` and ``values[layer]`` are (B, S, K). See `StaticCache.step`."""

    length = 0
    """No column is common to all rows. The positions and the mask of a step say where each row is."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], columns: Tensor) -> None:
        self.keys, self.values, self.columns = keys, values, columns

    def attend(self, layer: int, mask: Tensor | None) -> "StepAttention":
        """Return the attention of a layer. `mask` is (B, 1, 1, S)."""
        return StepAttention(self.keys[layer], self.values[layer], self.columns, mask)

    def advance(self, new: int) -> None:
        """Do nothing: the caller advances the columns of the rows."""


class StepAttention:
    """Attention of one layer and one new token per row over the columns of a static cache."""

    def __init__(self, keys: Tensor, values: Tensor, columns: Tensor, mask: Tensor | None) -> None:
        self.keys, self.values, self.columns, self.mask = keys, values, columns, mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """See `Attend`."""
        write(self.keys, self.columns, k)
        write(self.values, self.columns, v)
        keys, values = self.keys, self.values
        if torch.is_autocast_enabled(q.device.type):
            q = q.to(keys.dtype)
        else:
            keys, values = keys.to(q.dtype), values.to(q.dtype)
        return single_query(q, keys, values, mask=self.mask, scale=scale, dropout=dropout)
