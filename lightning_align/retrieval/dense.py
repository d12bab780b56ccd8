"""Dense retrieval: faiss behind the searches of stage 4 and behind live retrieval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_align.retrieval.encoders import Encoder
from lightning_align.retrieval.exact import ExactSearch, beside
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
from lightning_align.retrieval.tables import Bools, ChunkTable, Floats, Ints

MARGIN = 14
"""Neighbors that are asked for beyond k at least."""
MOST = 256
"""And at most: whoever then has too few, as the own document was nearest throughout, gets a search that leaves it out."""


class DenseSearcher:
    """Searches a faiss index, leaves out what must not be found, and asks again where too little is left.

    An exact index (Flat) is searched by `ExactSearch`. Of one that refines, what must not be found is left out before the
    candidates are compared, so that these are all of use.

    Args:
        index: over the vectors of all chunks of a database, set to its effort.
        groups: (C,) of each chunk, see `group_of_chunks`.
        effort: what the index is set to.
        vectors: (Q, d) of the chunks that `queries_of` is asked for.
    """

    def __init__(self, index: Any, groups: Ints, *, effort: int, vectors: NDArray[np.float16] | None = None) -> None:
        self.index, self.groups, self.effort, self.vectors = index, groups, effort, vectors
        # What candidates come from, and what compares them if that is another.
        both = load_faiss().downcast_index(index) if refines(index) else None
        self._base = index if both is None else both.base_index
        self._refine: Any = None if both is None else both.refine_index
        self._candidates = 1 if both is None else num_candidates(index, effort)
        flat = flat_vectors(index if both is None else both.refine_index)
        self._exact = None if flat is None else ExactSearch(flat, groups)
        self._free = free_neighbors(index, effort)
        self._num_groups = int(groups.max(initial=0)) + 1
        # Chunks by group, so that those of a group are a slice.
        self._order = np.argsort(groups, kind="stable")
        self._starts = np.searchsorted(groups[self._order], np.arange(self._num_groups + 1))
        self._sizes = np.diff(self._starts)

    def queries_of(self, table: ChunkTable, chunks: range) -> Floats:
        """See `Searcher`: their vectors."""
        assert self.vectors is not None
        return self.vectors[chunks.start : chunks.stop].astype(np.float32)

    def nearest(self, queries: Floats, k: int, forbidden: Forbidden) -> Nearest:
        """See `Searcher`."""
        if self._exact is not None and self._refine is None:
            return self._exact.nearest(queries, k, forbidden)
        there = forbidden.groups < self._num_groups  # all of a group may have been deleted
        forbidden = Forbidden(forbidden.rows[there], forbidden.groups[there])
        available = np.full(len(queries), len(self.groups) - self._starts[0])
        np.subtract.at(available, forbidden.rows, self._sizes[forbidden.groups])
        wanted = np.minimum(k, available)
        result = Nearest(
            np.zeros((len(queries), k), dtype=np.int64),
            np.zeros((len(queries), k), dtype=bool),
            np.full((len(queries), k), np.inf, dtype=np.float32),
        )
        # No more than wanted and all that is left out, in powers of two, so that as many are asked for with few searches.
        struck, candidates = len(self.groups) - available, min(self._candidates * k, len(self.groups))
        fetch = candidates + np.minimum(np.exp2(np.ceil(np.log2(np.maximum(struck, 1)))).astype(np.int64), MOST)
        fetch = np.maximum(fetch, max(candidates + MARGIN, self._free))
        fetch = np.minimum(np.where(struck > 0, fetch, k), len(self.groups))
        order = np.argsort(forbidden.rows, kind="stable")
        nothing = np.empty((len(queries), 0), dtype=np.int64)
        by_row = beside(nothing, forbidden.rows[order], forbidden.groups[order], DELETED)
        starved = []
        for number in np.unique(fetch[wanted > 0]):
            rows = np.flatnonzero((fetch == number) & (wanted > 0))
            index, most = (self.index, k) if number <= k else (self._base, candidates)
            distances, ids = index.search(queries[rows], int(number))
            found = pick(ids, distances, self._allowed(ids, by_row[rows]), most)
            starved.append(_fill(result, rows, found if number <= k else self._refined(queries[rows], found, k), wanted))
        rows = np.sort(np.concatenate(starved)) if starved else np.array([], dtype=np.int64)
        if self._exact is not None and len(rows):  # it has the vectors as they are, and few queries need them all
            there = np.isin(forbidden.rows, rows)
            left_out = Forbidden(np.searchsorted(rows, forbidden.rows[there]), forbidden.groups[there])
            _fill(result, rows, self._exact.nearest(queries[rows], k, left_out), wanted)
            return result
        for some, groups in _by_groups(rows, forbidden):
            self._search_selected(queries, some, groups, wanted, result)
        return result

    def _refined(self, queries: Floats, found: Nearest, k: int) -> Nearest:
        """The k nearest of (n, candidates), by the vectors of the index that refines, if there is one."""
        if self._refine is None:
            return found
        distances = np.where(found.mask, pair_distances(self._refine, queries, found.ids), np.float32(np.inf))
        order = np.lexsort((found.ids, distances), axis=1)[:, :k]
        ids, mask, distances = (np.take_along_axis(part, order, 1) for part in (found.ids, found.mask, distances))
        return Nearest(ids, mask, distances)

    def _allowed(self, ids: Ints, forbidden: Ints) -> Bools:
        """(n, found) of ids (n, found) and forbidden groups (n, most)."""
        groups = self.groups[np.maximum(ids, 0)]
        allowed: Bools = (ids >= 0) & (groups != DELETED)
        for column in forbidden.T:
            allowed &= groups != column[:, None]
        return allowed

    def _search_selected(self, queries: Floats, rows: Ints, groups: Ints, wanted: Ints, result: Nearest) -> None:
        """Search only what is allowed, looking at more and more of the index until there is enough."""
        faiss = load_faiss()
        k = result.ids.shape[1]
        parts = [self._order[: self._starts[0]], *(self._order[self._starts[g] : self._starts[g + 1]] for g in groups)]
        left_out = np.concatenate(parts)
        batch = faiss.IDSelectorBatch(left_out)
        effort = self.effort
        while len(rows):
            parameters = search_parameters(self.index, faiss.IDSelectorNot(batch), effort)
            if parameters is None:
                # It can only be asked for as many as may be left out besides; a query at a time, for these may be nearly all.
                number = min(k + len(left_out), len(self.groups))
                for row in rows:
                    distances, ids = self.index.search(queries[row : row + 1], number)
                    allowed = (ids >= 0) & ~np.isin(ids, left_out)
                    _fill(result, np.array([row]), pick(ids, distances, allowed, k), wanted)
                break
            distances, ids = self.index.search(queries[rows], k, params=parameters)
            rows = _fill(result, rows, pick(ids, distances, ids >= 0, k), wanted)
            if effort >= max_effort(self.index):
                break
            effort *= 2


def _fill(result: Nearest, rows: Ints, found: Nearest, wanted: Ints) -> Ints:
    """Write what was found, and return the rows that have too few."""
    result.ids[rows], result.mask[rows], result.distances[rows] = found
    starved: Ints = rows[found.mask.sum(1) < wanted[rows]]
    return starved


def _by_groups(rows: Ints, forbidden: Forbidden) -> list[tuple[Ints, Ints]]:
    """Rows to which the same groups are forbidden, with these groups."""
    groups: dict[int, list[int]] = {int(row): [] for row in rows}
    for row, group in zip(forbidden.rows.tolist(), forbidden.groups.tolist(), strict=True):
        if row in groups:
            groups[row].append(group)
    together: dict[tuple[int, ...], list[int]] = {}
    for row, some in groups.items():
        together.setdefault(tuple(sorted(set(some))), []).append(row)
    return [(np.array(members), np.array(some, dtype=np.int64)) for some, members in together.items()]


class DenseQueries:
    """Vectors of chunks that come as tokens, as stage 2 would have made them.

    Args:
        encoder: that of the index.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, queries: Sequence[ArrayLike]) -> Floats:
        """(n, d) of n runs of tokens."""
        # Rounded as those in the index are, so that a chunk is at distance 0 from itself.
        return self.encoder.encode(queries).astype(np.float16).astype(np.float32)
