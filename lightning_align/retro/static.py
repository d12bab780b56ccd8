"""The static form of a cache of generation with retrieval. See `lightning_align.models.static_cache`.

A step in which a row completes a chunk searches, which only the host can do. `StaticRetrieval.prepare` says so. All other steps
run the same operators on the same memory.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

ROWS = {"chunk": 0, "states": 0, "keys": 1, "values": 1, "mask": 0}
"""The tensors of a `RetrievalCache`, and the dimension of their rows."""


class StaticRetrieval:
    """The static cache of the decoder, and the chunk and the neighbors of each row.

    Args:
        cache: A `RetrievalCache` of prompts.
        batch: The number of rows.
        length: The number of columns.
    """

    def __init__(self, cache: Any, batch: int, length: int) -> None:
        self._decoder = cache.decoder.static(batch, length)
        self._parts = {name: _zeros(getattr(cache, name), dim, batch) for name, dim in ROWS.items()}
        self.complete: list[int] = []
        """The rows whose chunk the next token completes."""

    def prepare(self, lengths: Sequence[int]) -> bool:
        """Return whether the next step needs the host, and therefore cannot be captured.

        Args:
            lengths: The number of tokens of each row.
        """
        size = self._parts["chunk"].shape[1]
        self.complete = [row for row, length in enumerate(lengths) if (length + 1) % size == 0]
        return bool(self.complete)

    def insert(self, cache: Any, first: int, copies: int) -> None:
        """See `StaticCache.insert`."""
        self._decoder.insert(cache.decoder, first, copies)
        for name, dim in ROWS.items():
            new = getattr(cache, name)
            count = new.shape[dim] * copies
            repeated = new.repeat_interleave(copies, dim=dim, output_size=count)
            self._parts[name].narrow(dim, first, count).copy_(repeated)

    def select(self, rows: Tensor, columns: int) -> None:
        """See `StaticCache.select`."""
        self._decoder.select(rows, columns)
        for name, dim in ROWS.items():
            part = self._parts[name]
            part.narrow(dim, 0, len(rows)).copy_(part.index_select(dim, rows))

    def resize(self, batch: int, length: int) -> None:
        """See `StaticCache.resize`."""
        self._decoder.resize(batch, length)
        for name, dim in ROWS.items():
            old = self._parts[name]
            self._parts[name] = _zeros(old, dim, batch)
            rows = min(batch, old.shape[dim])
            self._parts[name].narrow(dim, 0, rows).copy_(old.narrow(dim, 0, rows))

    def step(self, columns: Tensor, width: int) -> "StepRetrieval":
        """See `StaticCache.step`."""
        views = {name: part.narrow(ROWS[name], 0, len(columns)) for name, part in self._parts.items()}
        return StepRetrieval(self, self._decoder.step(columns, width), **views)


class StepRetrieval:
    """The cache of a step of `StaticRetrieval`. The tensors are those of a `RetrievalCache`."""

    started = True

    def __init__(
        self,
        state: StaticRetrieval,
        decoder: Any,
        *,
        chunk: Tensor,
        states: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
    ) -> None:
        self.state, self.decoder = state, decoder
        self.chunk, self.states, self.keys, self.values, self.mask = chunk, states, keys, values, mask


def _zeros(like: Tensor, dim: int, rows: int) -> Tensor:
    return like.new_zeros([rows if at == dim else size for at, size in enumerate(like.shape)])
