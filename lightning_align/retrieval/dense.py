"""Dense retrieval with faiss, for the neighbors of stage 4 and for live retrieval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lightning_align.retrieval.device_search import exact_search
from lightning_align.retrieval.encoders import Encoder, in_precision
from lightning_align.retrieval.exact import append_to_rows
from lightning_align.retrieval.faiss_seam import (
    flat_vectors,
    free_neighbors,
    load_faiss,
    max_effort,
    num_candidates,
    pair_distances,
    refines,
    search_parameters,
)
from lightning_align.retrieval.neighbors import DELETED, Forbidden, Nearest, pick
from lightning_align.retrieval.stored import num_stored_candidates, stored_distances
from lightning_align.retrieval.tables import Bools, ChunkTable, Floats, Ints

MARGIN = 14
"""Minimum number of neighbors to request beyond the candidates."""
MOST = 256
"""Maximum number of neighbors to request beyond the candidates. A query that then has too few, because most results are
forbidden, is searched again with the forbidden groups excluded."""


class DenseSearcher:
    """Searches a faiss index, removes forbidden chunks, and searches again if too few chunks are left.

    An exact index (Flat) is searched by `ExactSearch`, or on a device with the same results. If the index refines, forbidden
    chunks are removed before the candidates are compared, so that no comparison is wasted.

    Args:
        index: Index over the vectors of all chunks of a database, set to its effort.
        groups: (C,) group of each chunk, see `group_of_chunks`.
        effort: The effort that the index is set to.
        vectors: (Q, d) vectors of the chunks that `queries_of` is called with.
        device: The device for exact search. Default is the CPU, where all other searches run.
        stored: (C, d) vectors of all chunks, if they compare the candidates of the index, see `stored`.
    """

    def __init__(
        self,
        index: Any,
        groups: Ints,
        *,
        effort: int,
        vectors: NDArray[np.float16] | None = None,
        device: torch.device | None = None,
        stored: NDArray[np.float16] | None = None,
    ) -> None:
        self.index, self.groups, self.effort, self.vectors, self._stored = index, groups, effort, vectors, stored
        # The index that candidates come from, and the index that compares them if it is another one.
        both = load_faiss().downcast_index(index) if refines(index) else None
        self._base = index if both is None else both.base_index
        self._refine: Any = None if both is None else both.refine_index
        self._candidates = 1 if both is None else num_candidates(index, effort)
        if stored is not None:
            self._candidates = num_stored_candidates(index, effort)
        flat = flat_vectors(index if both is None else both.refine_index)
        self._exact = None if flat is None else exact_search(flat, groups, device)
        self._free = free_neighbors(index, effort)
        self._num_groups = int(groups.max(initial=0)) + 1
        # Chunks sorted by group, so that the chunks of a group are a slice.
        self._order = np.argsort(groups, kind="stable")
        self._starts = np.searchsorted(groups[self._order], np.arange(self._num_groups + 1))
        self._sizes = np.diff(self._starts)

    def queries_of(self, table: ChunkTable, chunks: range) -> Floats:
        """See `Searcher`. Queries are vectors."""
        assert self.vectors is not None
        return self.vectors[chunks.start : chunks.stop].astype(np.float32)

    def nearest(self, queries: Floats, k: int, forbidden: Forbidden) -> Nearest:
        """See `Searcher`."""
        if self._exact is not None and self._refine is None:
            return self._exact.nearest(queries, k, forbidden)
        known = forbidden.groups < self._num_groups  # the last groups may have been deleted completely
        forbidden = Forbidden(forbidden.rows[known], forbidden.groups[known])
        available = np.full(len(queries), len(self.groups) - self._starts[0])
        np.subtract.at(available, forbidden.rows, self._sizes[forbidden.groups])
        wanted = np.minimum(k, available)
        result = Nearest(
            np.zeros((len(queries), k), dtype=np.int64),
            np.zeros((len(queries), k), dtype=bool),
            np.full((len(queries), k), np.inf, dtype=np.float32),
        )
        # Request the candidates and all excluded chunks. The number of excluded chunks is rounded up to a power of two, so that
        # queries fall into few batches.
        num_excluded, candidates = len(self.groups) - available, min(self._candidates * k, len(self.groups))
        fetch = candidates + np.minimum(np.exp2(np.ceil(np.log2(np.maximum(num_excluded, 1)))).astype(np.int64), MOST)
        fetch = np.maximum(fetch, max(candidates + MARGIN, self._free))
        fetch = np.minimum(np.where(num_excluded > 0, fetch, k if self._stored is None else candidates), len(self.groups))
        order = np.argsort(forbidden.rows, kind="stable")
        nothing = np.empty((len(queries), 0), dtype=np.int64)
        by_row = append_to_rows(nothing, forbidden.rows[order], forbidden.groups[order], DELETED)
        incomplete = []
        for number in np.unique(fetch[wanted > 0]):
            rows = np.flatnonzero((fetch == number) & (wanted > 0))
            is_whole = number <= k and self._stored is None
            index, most = (self.index, k) if is_whole else (self._base, candidates)
            distances, ids = index.search(queries[rows], int(number))
            found = pick(ids, distances, self._allowed(ids, by_row[rows]), most)
            incomplete.append(_fill(result, rows, found if is_whole else self._refined(queries[rows], found, k), wanted))
        rows = np.sort(np.concatenate(incomplete)) if incomplete else np.array([], dtype=np.int64)
        if self._exact is not None and len(rows):  # an exact second search is affordable, because few queries need it
            selected = np.isin(forbidden.rows, rows)
            excluded = Forbidden(np.searchsorted(rows, forbidden.rows[selected]), forbidden.groups[selected])
            _fill(result, rows, self._exact.nearest(queries[rows], k, excluded), wanted)
            return result
        for some, groups in _rows_by_groups(rows, forbidden):
            self._search_selected(queries, some, groups, wanted, result)
        return result

    def _refined(self, queries: Floats, found: Nearest, k: int) -> Nearest:
        """Select the k nearest of the candidates (n, candidates) by stored vectors, or those of the refining index, if any."""
        if self._refine is None and self._stored is None:
            return found
        if self._stored is None:
            distances = np.where(found.mask, pair_distances(self._refine, queries, found.ids), np.float32(np.inf))
        else:
            distances = stored_distances(self._stored, queries, np.where(found.mask, found.ids, -1))
        order = np.lexsort((found.ids, distances), axis=1)[:, :k]
        ids, mask, distances = (np.take_along_axis(part, order, 1) for part in (found.ids, found.mask, distances))
        return Nearest(ids, mask, distances)

    def _allowed(self, ids: Ints, forbidden: Ints) -> Bools:
        """Return which ids (n, found) are allowed, given the forbidden groups (n, most) of each row."""
        groups = self.groups[np.maximum(ids, 0)]
        allowed: Bools = (ids >= 0) & (groups != DELETED)
        for column in forbidden.T:
            allowed &= groups != column[:, None]
        return allowed

    def _search_selected(self, queries: Floats, rows: Ints, groups: Ints, wanted: Ints, result: Nearest) -> None:
        """Search allowed chunks only. Double the effort until each row has enough results."""
        faiss = load_faiss()
        k = result.ids.shape[1]
        most = k if self._stored is None else min(self._candidates * k, len(self.groups))
        parts = [self._order[: self._starts[0]], *(self._order[self._starts[g] : self._starts[g + 1]] for g in groups)]
        excluded = np.concatenate(parts)
        batch = faiss.IDSelectorBatch(excluded)
        effort = self.effort
        while len(rows):
            parameters = search_parameters(self.index, faiss.IDSelectorNot(batch), effort)
            if parameters is None:
                # This index cannot exclude chunks, so request all excluded chunks in addition. They can be nearly all, so
                # search one query at a time.
                number = min(most + len(excluded), len(self.groups))
                for row in rows:
                    query = queries[row : row + 1]
                    distances, ids = self.index.search(query, number)
                    found = pick(ids, distances, (ids >= 0) & ~np.isin(ids, excluded), most)
                    _fill(result, np.array([row]), found if self._stored is None else self._refined(query, found, k), wanted)
                break
            distances, ids = self.index.search(queries[rows], most, params=parameters)
            found = pick(ids, distances, ids >= 0, most)
            rows = _fill(result, rows, found if self._stored is None else self._refined(queries[rows], found, k), wanted)
            if effort >= max_effort(self.index):
                break
            effort *= 2


def _fill(result: Nearest, rows: Ints, found: Nearest, wanted: Ints) -> Ints:
    """Write what was found to the result, and return the rows that have too few neighbors."""
    result.ids[rows], result.mask[rows], result.distances[rows] = found
    incomplete: Ints = rows[found.mask.sum(1) < wanted[rows]]
    return incomplete


def _rows_by_groups(rows: Ints, forbidden: Forbidden) -> list[tuple[Ints, Ints]]:
    """Group the rows by their forbidden groups: pairs of rows and the groups that are forbidden to them."""
    groups: dict[int, list[int]] = {int(row): [] for row in rows}
    for row, group in zip(forbidden.rows.tolist(), forbidden.groups.tolist(), strict=True):
        if row in groups:
            groups[row].append(group)
    together: dict[tuple[int, ...], list[int]] = {}
    for row, some in groups.items():
        together.setdefault(tuple(sorted(set(some))), []).append(row)
    return [(np.array(members), np.array(some, dtype=np.int64)) for some, members in together.items()]


class DenseQueries:
    """Encodes queries that come as tokens, in the same way as stage 2.

    Args:
        encoder: The encoder of the index.
        precision: The precision of the Trainer that ran stage 2. None encodes in the precision of the caller.
        dim: The dimension of the vectors of the index. Default is not to check it.
    """

    def __init__(self, encoder: Encoder, *, precision: str | None = None, dim: int | None = None) -> None:
        self.encoder, self.precision, self.dim = encoder, precision, dim

    def __call__(self, queries: Sequence[ArrayLike]) -> Floats:
        """Encode n sequences of tokens to vectors (n, d).

        Raises:
            ValueError: If the vectors have another dimension than those of the index.
        """
        # Round to float16 like the vectors in the index, so that a chunk has distance 0 to itself.
        with in_precision(self.encoder, self.precision):
            vectors = self.encoder.encode(queries).astype(np.float16).astype(np.float32)
        if self.dim is not None and vectors.shape != (len(queries), self.dim):
            raise ValueError(
                f"The encoder must return vectors like those of the database, ({len(queries)}, {self.dim}), but"
                f" {type(self.encoder).__name__} returned the shape {vectors.shape}. Use the encoder that it was built with."
            )
        return vectors
