"""Live retrieval: what generation asks for the neighbors of tokens that nobody has seen before."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from lightning_align.retrieval.neighbors import Forbidden, Searcher
from lightning_align.retrieval.tables import Bools, ChunkTable, Floats, Ints, Tokens


class Found(NamedTuple):
    """The neighbors of n queries, nearest first."""

    ids: Ints
    """(n, k) chunk numbers; 0 where the mask is false."""
    mask: Bools
    """(n, k) whether there is such a neighbor; the false ones stand behind the true ones."""
    distances: Floats
    """(n, k) the smaller the nearer; infinite where there is none."""
    tokens: Tokens
    """(n, k, 2m) each neighbor with its continuation; all padding where there is none."""


class Retriever(Protocol):
    """What finds chunks that are like given tokens."""

    @property
    def chunk_size(self) -> int:
        """Tokens a chunk (m): what one query should have."""
        ...

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer whose ids the queries must be."""
        ...

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """Find the k nearest chunks of each query.

        Args:
            queries: n runs of token ids, a chunk each, unpadded.
            k: how many; where there are fewer, slots are masked.
            exclude: for each query the ids of documents that must not be returned.
        """
        ...


class DatabaseRetriever:
    """A `Retriever` over the chunks of a database.

    Args:
        table: the chunks.
        searcher: finds them.
        make_queries: what the searcher takes, of runs of tokens.
        deleted: numbers of documents that nobody may find.
    """

    def __init__(
        self, table: ChunkTable, searcher: Searcher, make_queries: Callable[[Sequence[ArrayLike]], Any], *, deleted: Ints
    ) -> None:
        self.table, self.searcher, self.make_queries = table, searcher, make_queries
        self._deleted = set(deleted.tolist())
        # Deleted documents go first: one that was replaced has left its name to its successor.
        order = sorted(range(table.num_documents), key=lambda number: number not in self._deleted)
        self._numbers = {table.document_ids[number]: number for number in order}

    @property
    def chunk_size(self) -> int:
        """See `Retriever`."""
        return self.table.chunk_size

    @property
    def tokenizer_fingerprint(self) -> str:
        """See `Retriever`."""
        return self.table.tokenizer_fingerprint

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """See `Retriever`. With a document its near-duplicates are excluded.

        Raises:
            ValueError: if k is not positive, a query is empty or no run of this tokenizer's ids, there is not one `exclude` for
                each query, or it names no document of the database.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected 1 or more")
        runs = [np.asarray(query) for query in queries]
        for place, run in enumerate(runs):
            if run.ndim != 1 or not len(run) or not 0 <= run.min() <= run.max() < self.table.vocab_size:
                raise ValueError(
                    f"query {place} has the shape {run.shape} and ids {run[:4].tolist()}...: expected a run of one token or "
                    f"more with ids from 0 to {self.table.vocab_size - 1}, of the tokenizer that the database was built with"
                )
        if exclude is not None and len(exclude) != len(runs):
            raise ValueError(f"exclude has {len(exclude)} lists for {len(runs)} queries, expected one for each")
        if not runs:
            return self._found(
                np.zeros((0, k), dtype=np.int64), np.zeros((0, k), dtype=bool), np.zeros((0, k), dtype=np.float32)
            )
        nearest = self.searcher.nearest(self.make_queries(runs), k, self._forbidden(exclude or []))
        return self._found(*nearest)

    def _forbidden(self, exclude: Sequence[Sequence[str]]) -> Forbidden:
        pairs = set()
        for row, names in enumerate(exclude):
            for name in names:
                if name not in self._numbers:
                    raise ValueError(f"exclude names the document {name!r}, which the database does not have")
                number = self._numbers[name]
                if number not in self._deleted:
                    pairs.add((row, int(self.table.groups[number])))
        rows, groups = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
        return Forbidden(rows, groups)

    def _found(self, ids: Ints, mask: Bools, distances: Floats) -> Found:
        tokens = self.table.gather(ids, 2 * self.chunk_size)
        there = tokens.mask & mask[..., None]
        return Found(ids, mask, distances, Tokens(np.where(there, tokens.ids, self.table.pad_id), there))
