"""Exact search that excludes chunks at almost no cost. It compares every query with every vector, a tile of scores at a time.

faiss returns the nearest of all vectors, and the vectors of the query's own document must be removed from them. If the nearest
hundred vectors are of the own document, the search must be repeated with more and more neighbors. `ExactSearch` sets the scores
of forbidden vectors to minus infinity before it selects any, so a single pass of matrix products suffices.

Matrix products round, and the rounding depends on the shapes. So `ExactSearch` selects candidates by score and compares them by
distances in float64, each computed alone. It searches again for queries for which rounding may have hidden a nearer vector. The
result is the k nearest in float64. Of equally near vectors, those with the lowest numbers are returned. The result of a query
does not depend on the other queries of the batch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_align.retrieval.neighbors import Forbidden, Nearest
from lightning_align.retrieval.tables import Floats, Ints

Doubles = NDArray[np.float64]

ROWS, COLUMNS = 2048, 1024
"""Shape of a tile of scores. Its 8 MiB fit into the cache. A tile with fewer rows has more columns."""
FEW = 256
"""With fewer queries than this, one thread is used."""
WIDTH = 128
"""Scores per block. Only blocks with a maximum that is high enough are looked at."""
PAIRS = 1024
"""Pairs of a query and a vector that distances are computed for together."""


class ExactSearch:
    """Compares queries with all vectors of a database.

    Args:
        vectors: (C, d), can be memory-mapped.
        groups: (C,) group of each vector's document, negative for deleted documents, which no query may find.
    """

    def __init__(self, vectors: Floats, groups: Ints) -> None:
        self.vectors, self.deleted = vectors, groups < 0
        self._order = np.argsort(groups, kind="stable")
        self._groups = groups[self._order]

    def nearest(self, queries: Floats, k: int, forbidden: Forbidden) -> Nearest:
        """Find the k nearest vectors that each query may find, see `Searcher`."""
        threads = torch.get_num_threads()
        size = min(ROWS, -(-len(queries) // threads)) if len(queries) >= FEW else FEW
        assert np.isfinite(self._largest)  # computes it before several threads access it

        def part(start: int) -> tuple[Ints, Doubles]:
            mine = (forbidden.rows >= start) & (forbidden.rows < start + size)
            return self._nearest(
                queries[start : start + size], k, Forbidden(forbidden.rows[mine] - start, forbidden.groups[mine])
            )

        starts = range(0, len(queries), size)
        if threads == 1 or len(starts) < 2:
            found = [part(start) for start in starts]
        else:
            # Each thread handles a part of the queries alone. This is faster than all threads together on each product.
            try:
                with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    found = list(pool.map(part, starts))
            finally:
                torch.set_num_threads(threads)
        return joined(found, k)

    @cached_property
    def _shift(self) -> Floats:
        """(C,) minus half of |x|², and minus infinity for vectors of deleted documents."""
        shift = np.empty(len(self.vectors), dtype=np.float32)
        for start in range(0, len(shift), COLUMNS):
            part = self.vectors[start : start + COLUMNS]
            shift[start : start + COLUMNS] = np.einsum("nd,nd->n", part, part, dtype=np.float64) / -2
        shift[self.deleted] = -np.inf
        return shift

    @cached_property
    def _largest(self) -> float:
        """Largest norm |x|."""
        return float(np.sqrt(2 * -self._shift[~self.deleted].min(initial=0.0)))

    def _nearest(self, queries: Floats, k: int, forbidden: Forbidden) -> tuple[Ints, Doubles]:
        """Return the numbers (n, at most k) of the nearest vectors and their distances, infinite in empty slots."""
        width = min(k, len(self.vectors))
        # Keep one more than needed. Its score tells whether rounding may have hidden a nearer vector.
        best = self._best(queries, width + 1, forbidden)
        lowest = best.scores[:, -1]
        distances = self._distances(queries, best.ids)
        distances[np.isneginf(best.scores)] = np.inf
        ids, distances = _sorted(best.ids, distances, width)
        # `needed` is a lower bound of the score of any vector as near as the last result. If the lowest score that was kept is
        # below it, no vector as near was missed. The error of a score is at most one part in 2^24 for each of its d products
        # and sums (Higham 2002, section 3.1). Twice this is assumed.
        norms = np.linalg.norm(queries.astype(np.float64), axis=1)
        rounding = (queries.shape[1] + 8) * 2.0**-23 * self._largest * (norms + self._largest)
        needed = (np.square(norms) - distances[:, -1]) / 2 - rounding
        doubtful = np.flatnonzero(np.isfinite(lowest) & (lowest >= needed))
        if len(doubtful):
            selected = np.isin(forbidden.rows, doubtful)
            some = Forbidden(np.searchsorted(doubtful, forbidden.rows[selected]), forbidden.groups[selected])
            ids[doubtful], distances[doubtful] = self._within(queries[doubtful], needed[doubtful], width, some)
        return ids, distances

    def _best(self, queries: Floats, wanted: int, forbidden: Forbidden) -> "Best":
        """Find the vectors (n, wanted) with the highest scores. Of equal scores, any are kept."""
        best = Best.empty(len(queries), wanted)
        for column, scores in self._tiles(queries, self._areas(forbidden)):
            best.improve(column, scores)
        return best

    def _within(self, queries: Floats, needed: Doubles, width: int, forbidden: Forbidden) -> tuple[Ints, Doubles]:
        """Find the nearest (n, width) of all vectors with the needed score, in order of distance, then number."""
        ids, distances = np.zeros((len(queries), width), dtype=np.int64), np.full((len(queries), width), np.inf)
        for row, number in self._above(queries, needed, forbidden):
            some, inverse = _distinct(row)
            near = self._distances(queries, number[:, None], row)[:, 0]
            ids[some], distances[some] = _sorted(
                append_to_rows(ids[some], inverse, number, 0),
                append_to_rows(distances[some], inverse, near, np.inf),
                width,
            )
            # Vectors come in order of number. At distance 0 in all slots, no later vector can be better.
            needed[distances[:, -1] == 0] = np.inf
        return ids, distances

    def _above(self, queries: Floats, needed: Doubles, forbidden: Forbidden) -> Iterator[tuple[Ints, Ints]]:
        """Yield rows, ascending, and numbers of vectors with at least the needed score (n,), tile by tile.

        The caller may raise the needed scores meanwhile.
        """
        for column, scores in self._tiles(queries, self._areas(forbidden)):
            row, place = np.nonzero(scores >= needed[:, None])
            yield row, column + place

    def _tiles(self, queries: Floats, areas: list["_Area"]) -> Iterator[tuple[int, Floats]]:
        """Yield the first column and the scores (n, columns) of each tile. The next tile overwrites the scores.

        A score is half of |q|² - |q - x|², so a higher score is nearer. It is minus infinity for a forbidden vector.
        """
        columns = min(COLUMNS * max(1, ROWS // len(queries)), len(self.vectors))
        memory = torch.empty(len(queries) * columns)
        points, vectors, shift = torch.from_numpy(queries), torch.from_numpy(self.vectors), torch.from_numpy(self._shift)
        for start in range(0, len(self.vectors), columns):
            stop = min(start + columns, len(self.vectors))
            tile = memory[: len(queries) * (stop - start)].view(len(queries), stop - start)
            torch.addmm(shift[start:stop], points, vectors[start:stop].T, out=tile)
            scores = tile.numpy()
            for area in areas:
                if area.ids[0] < stop and area.ids[-1] >= start:
                    area.strike_out(scores, start)
            yield start, scores

    def _areas(self, forbidden: Forbidden) -> list["_Area"]:
        order = np.lexsort((forbidden.rows, forbidden.groups))
        rows, groups = forbidden.rows[order], forbidden.groups[order]
        ends = np.flatnonzero(np.diff(groups, append=-1))
        low, high = (np.searchsorted(self._groups, groups[ends], side=side) for side in ("left", "right"))
        parts = np.split(rows, ends[:-1] + 1) if len(ends) else []
        return [_Area(np.unique(part), self._order[a:b]) for part, a, b in zip(parts, low, high, strict=True) if a < b]

    def _distances(self, queries: Floats, ids: Ints, rows: Ints | None = None) -> Doubles:
        """Compute the squared distances (n, k) of queries, or of these rows of them, to vectors (n, k).

        Each distance is computed in the same way and alone, so it does not depend on the others.
        """
        rows = np.arange(len(ids)) if rows is None else rows
        result = np.empty(ids.shape)
        step = max(1, PAIRS // ids.shape[1])
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            gaps = np.subtract(self.vectors[ids[part]], queries[rows[part], None], dtype=np.float64)
            result[part] = np.square(gaps, out=gaps).sum(-1)
        return result


class _Area(NamedTuple):
    """Queries and the vectors that none of them may find. Both are ascending."""

    rows: Ints
    ids: Ints

    def strike_out(self, scores: Floats, column: int) -> None:
        """Set the scores of the area to minus infinity, in a tile that begins at `column`."""
        low, high = np.searchsorted(self.ids, (column, column + scores.shape[1]))
        if low == high:
            return
        rows, columns = _span(self.rows), _span(self.ids[low:high] - column)
        both = isinstance(rows, np.ndarray) and isinstance(columns, np.ndarray)
        scores[np.ix_(rows, columns) if both else (rows, columns)] = -np.inf  # type: ignore[arg-type]


class Best(NamedTuple):
    """The best vectors per query so far, best first. The score is minus infinity in empty slots."""

    ids: Ints
    scores: Floats

    @classmethod
    def empty(cls, num: int, width: int) -> "Best":
        """Return empty slots."""
        return cls(np.zeros((num, width), dtype=np.int64), np.full((num, width), -np.inf, dtype=np.float32))

    def improve(self, column: int, scores: Floats) -> None:
        """Replace the worst entries by better ones of a tile. After the first tiles, few queries have any."""
        wanted, columns = self.scores.shape[1], scores.shape[1]
        width = columns if columns % WIDTH else WIDTH
        highest, worst = torch.from_numpy(scores).view(len(scores), -1, width).amax(2).numpy(), self.scores[:, -1]
        enough = next((some for some in (highest, scores) if some.shape[1] >= wanted), None)
        if enough is not None and np.isneginf(worst).any():
            # `wanted` blocks or vectors have a score at least as high as `high`, so lower scores are not among the best.
            high = np.partition(enough, -wanted, axis=1)[:, -wanted]
            worst = np.maximum(worst, np.nextafter(high, np.float32(-np.inf)))
        over = np.flatnonzero(highest > worst[:, None])
        if not len(over):
            return
        values, row = scores.reshape(-1, width)[over], over // highest.shape[1]
        better = np.flatnonzero(values > worst[row, None])
        which, place = np.divmod(better, width)
        some, inverse = _distinct(row[which])
        found = append_to_rows(self.ids[some], inverse, column + over[which] % highest.shape[1] * width + place, 0)
        values = append_to_rows(self.scores[some], inverse, values.reshape(-1)[better], -np.inf)
        order = np.argsort(-values, axis=1, kind="stable")[:, :wanted]
        self.ids[some], self.scores[some] = np.take_along_axis(found, order, 1), np.take_along_axis(values, order, 1)


def _span(numbers: Ints) -> slice | Ints:
    """Return ascending numbers as a slice if they are consecutive, because slices are faster."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def _sorted(ids: Ints, distances: Doubles, width: int) -> tuple[Ints, Doubles]:
    """Return the first `width` entries of each row in order of distance, then number."""
    order = np.lexsort((ids, distances), axis=1)[:, :width]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)


def _distinct(rows: Ints) -> tuple[Ints, Ints]:
    """Return the distinct values of ascending rows, and the index of each row among them."""
    first = np.diff(rows, prepend=-1) > 0
    return rows[first], np.cumsum(first) - 1


def append_to_rows(left: NDArray[Any], rows: Ints, values: NDArray[Any], fill: float) -> NDArray[Any]:
    """Append values to the rows of a matrix, as many as each row has.

    Args:
        left: (n, w) matrix.
        rows: (v,) row that each value belongs to, ascending.
        values: (v,) values to append.
        fill: Padding of rows that get fewer values than others.

    Returns:
        (n, w + the largest number of values per row).
    """
    counts = np.bincount(rows, minlength=len(left))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    wide = np.full((len(left), left.shape[1] + counts.max(initial=0)), fill, dtype=left.dtype)
    wide[:, : left.shape[1]] = left
    wide[rows, left.shape[1] + place] = values
    return wide


def joined(parts: Sequence[tuple[Ints, NDArray[Any]]], k: int) -> Nearest:
    """Return the ids and distances (n, k' <= k) of consecutive queries as one result, padded to k neighbors."""
    ids, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
    mask, missing = np.isfinite(distances), ((0, 0), (0, k - ids.shape[1]))
    return Nearest(
        np.pad(np.where(mask, ids, 0), missing),
        np.pad(mask, missing),
        np.pad(distances.astype(np.float32), missing, constant_values=np.inf),
    )
