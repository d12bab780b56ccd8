"""Live retrieval: search for the neighbors of new tokens, as generation does."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from lightning_align.retrieval.neighbors import Forbidden, Searcher
from lightning_align.retrieval.tables import Bools, ChunkTable, Floats, Ints, Tokens


class Found(NamedTuple):
    """The neighbors of n queries, nearest first."""

    ids: Ints
    """(n, k) chunk numbers, 0 where the mask is false."""
    mask: Bools
    """(n, k) true where there is a neighbor. In each row, true entries come before false entries."""
    distances: Floats
    """(n, k) distances, where smaller is nearer. Infinite where there is no neighbor."""
    tokens: Tokens
    """(n, k, 2m) each neighbor followed by its continuation. All padding where there is no neighbor."""


class Retriever(Protocol):
    """Finds chunks that are similar to given tokens."""

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk (m). A query should have the same length."""
        ...

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer. Queries must be ids of this tokenizer."""
        ...

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """Find the k nearest chunks of each query.

        Args:
            queries: n sequences of token ids, a chunk each, unpadded.
            k: The number of neighbors per query. If fewer exist, the remaining slots are masked.
            exclude: For each query, the names of the documents that must not be returned.
        """
        ...


def check_search(num_queries: int, k: int, exclude: Sequence[Sequence[str]] | None) -> None:
    """Check the arguments of `Retriever.search`.

    Raises:
        ValueError: If `k` is not positive, or `exclude` does not have an entry per query.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, but got {k}.")
    if exclude is not None and len(exclude) != num_queries:
        raise ValueError(f"`exclude` must have a list per query, but got {len(exclude)} lists for {num_queries} queries.")


def collect(results: Iterable[Iterable[tuple[int, float, Sequence[int]]]], shape: tuple[int, int, int], pad_id: int) -> Found:
    """Collect what an engine returns.

    Args:
        results: For each query, the chunk number, the distance and the tokens of each neighbor, nearest first.
        shape: The number of queries, of neighbors and of tokens (n, k, 2m).
        pad_id: The id of padding.
    """
    ids, mask = np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2], dtype=np.bool_)
    distances = np.full(shape[:2], np.inf, dtype=np.float32)
    tokens, token_mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    for row, neighbors in enumerate(results):
        for place, (number, distance, run) in enumerate(neighbors):
            ids[row, place], mask[row, place], distances[row, place] = number, True, distance
            tokens[row, place, : len(run)], token_mask[row, place, : len(run)] = run, True
    return Found(ids, mask, distances, Tokens(tokens, token_mask))


class DatabaseRetriever:
    """A `Retriever` over the chunks of a database. Several threads can use it. It searches for one at a time.

    Args:
        table: The chunks of the database.
        searcher: Finds the nearest chunks.
        make_queries: Converts sequences of token ids to queries of the searcher.
        deleted: Numbers of the deleted documents, which are never returned.
    """

    def __init__(
        self, table: ChunkTable, searcher: Searcher, make_queries: Callable[[Sequence[ArrayLike]], Any], *, deleted: Ints
    ) -> None:
        # A compaction by another process can remove the files while this one searches.
        self.table, self.searcher, self.make_queries = table.hold(), searcher, make_queries
        self._lock = threading.Lock()  # searchers keep scores between the steps of a search
        self._deleted = set(deleted.tolist())
        # Deleted documents come first, so that the name of a replaced document maps to its successor.
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
        """See `Retriever`. If a document is excluded, its near-duplicates are too.

        Raises:
            ValueError: If `k` is not positive, a query is empty or has ids that the tokenizer does not have, `exclude` does not
                have an entry per query, or it names a document that the database does not have.
        """
        check_search(len(queries), k, exclude)
        runs = [np.asarray(query) for query in queries]
        for place, run in enumerate(runs):
            if run.ndim != 1 or not len(run) or not 0 <= run.min() <= run.max() < self.table.vocab_size:
                raise ValueError(
                    f"Each query must be a sequence of one token or more with ids from 0 to {self.table.vocab_size - 1}, but "
                    f"query {place} has the shape {run.shape} and the ids {run[:4].tolist()}... "
                    "Use the tokenizer that the database was built with."
                )
        if not runs:
            return self._found(
                np.zeros((0, k), dtype=np.int64), np.zeros((0, k), dtype=bool), np.zeros((0, k), dtype=np.float32)
            )
        with self._lock:
            nearest = self.searcher.nearest(self.make_queries(runs), k, self._forbidden(exclude or []))
        return self._found(*nearest)

    def _forbidden(self, exclude: Sequence[Sequence[str]]) -> Forbidden:
        pairs = set()
        for row, names in enumerate(exclude):
            for name in names:
                if name not in self._numbers:
                    raise ValueError(
                        f"`exclude` must name documents of the database, but it has no document {name!r}. "
                        "Its `chunks.document_ids` lists the documents."
                    )
                number = self._numbers[name]
                if number not in self._deleted:
                    pairs.add((row, int(self.table.groups[number])))
        rows, groups = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
        return Forbidden(rows, groups)

    def _found(self, ids: Ints, mask: Bools, distances: Floats) -> Found:
        tokens = self.table.gather(ids, 2 * self.chunk_size)
        token_mask = tokens.mask & mask[..., None]
        return Found(ids, mask, distances, Tokens(np.where(token_mask, tokens.ids, self.table.pad_id), token_mask))
