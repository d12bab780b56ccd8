"""Exact search that leaves chunks out at next to no cost: every query against every vector, a tile of scores at a time.

faiss finds the nearest of all vectors, from which those of the own document would have to be struck out: a query whose nearest
hundred are of its own document would be asked for again and again. Here they are struck out of the scores before anything is
picked from these, so that one pass of matrix products is all there is.

Products of matrices round, and how depends on their shapes. So the best of each query by score are compared by distances in
float64, each computed alone, and a query of which rounding might have hidden a nearer vector is looked at once more. What comes
out is the k nearest in float64, of equally near ones those with the lowest numbers, whatever is searched for beside it.
"""

from collections.abc import Iterator
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
"""Of a tile of scores, which with 8 MiB stays in cache; with fewer rows it has more columns."""
FEW = 256
"""Queries that are not worth threads of their own."""
WIDTH = 128
"""Scores of which the highest says whether any of them is worth a look."""
PAIRS = 1024
"""Whose distances are computed together."""


class ExactSearch:
    """Compares queries with all vectors of a database.

    Args:
        vectors: (C, d), may be memory-mapped.
        groups: (C,) of each vector's document; negative where nobody may find it.
    """

    def __init__(self, vectors: Floats, groups: Ints) -> None:
        self.vectors, self.deleted = vectors, groups < 0
        self._order = np.argsort(groups, kind="stable")
        self._groups = groups[self._order]

    def nearest(self, queries: Floats, k: int, forbidden: Forbidden) -> Nearest:
        """The k nearest vectors of each query that it may find; see `Searcher`."""
        threads = torch.get_num_threads()
        size = min(ROWS, -(-len(queries) // threads)) if len(queries) >= FEW else FEW
        assert np.isfinite(self._largest)  # also makes it before threads ask for it together

        def part(start: int) -> tuple[Ints, Doubles]:
            mine = (forbidden.rows >= start) & (forbidden.rows < start + size)
            return self._nearest(
                queries[start : start + size], k, Forbidden(forbidden.rows[mine] - start, forbidden.groups[mine])
            )

        starts = range(0, len(queries), size)
        if threads == 1 or len(starts) < 2:
            found = [part(start) for start in starts]
        else:
            # A thread for some of the queries, which waits for nobody, is faster than all of them for each product.
            try:
                with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    found = list(pool.map(part, starts))
            finally:
                torch.set_num_threads(threads)
        ids, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
        mask, missing = np.isfinite(distances), ((0, 0), (0, k - ids.shape[1]))
        return Nearest(
            np.pad(np.where(mask, ids, 0), missing),
            np.pad(mask, missing),
            np.pad(distances.astype(np.float32), missing, constant_values=np.inf),
        )

    @cached_property
    def _shift(self) -> Floats:
        """(C,) minus half of |x|²; minus infinity for those that nobody may find."""
        shift = np.empty(len(self.vectors), dtype=np.float32)
        for start in range(0, len(shift), COLUMNS):
            part = self.vectors[start : start + COLUMNS]
            shift[start : start + COLUMNS] = np.einsum("nd,nd->n", part, part, dtype=np.float64) / -2
        shift[self.deleted] = -np.inf
        return shift

    @cached_property
    def _largest(self) -> float:
        """The largest |x|."""
        return float(np.sqrt(2 * -self._shift[~self.deleted].min(initial=0.0)))

    def _nearest(self, queries: Floats, k: int, forbidden: Forbidden) -> tuple[Ints, Doubles]:
        """(n, at most k) numbers of the nearest and their distances, infinite where there is none."""
        areas, width = self._areas(forbidden), min(k, len(self.vectors))
        # One more than is wanted: what it scores tells whether rounding leaves a doubt about the others.
        best = _Best.empty(len(queries), width + 1)
        for column, scores in self._tiles(queries, areas):
            best.improve(column, scores)
        lowest = best.scores[:, -1]
        distances = self._distances(queries, best.ids)
        distances[np.isneginf(best.scores)] = np.inf
        ids, distances = _sorted(best.ids, distances, width)
        # What a vector as near as the last of these scores at least. If the lowest kept does not, nothing as near was missed.
        # A score is off by at most a part in 2^24 for each of its d products and sums (Higham 2002, section 3.1), twice here.
        norms = np.linalg.norm(queries.astype(np.float64), axis=1)
        rounding = (queries.shape[1] + 8) * 2.0**-23 * self._largest * (norms + self._largest)
        needed = (np.square(norms) - distances[:, -1]) / 2 - rounding
        doubtful = np.flatnonzero(np.isfinite(lowest) & (lowest >= needed))
        if len(doubtful):
            areas = [area for area in areas if np.isin(doubtful, area.rows).any()]
            some = [area._replace(rows=np.flatnonzero(np.isin(doubtful, area.rows))) for area in areas]
            ids[doubtful], distances[doubtful] = self._within(queries[doubtful], needed[doubtful], width, some)
        return ids, distances

    def _within(self, queries: Floats, needed: Doubles, width: int, areas: list["_Area"]) -> tuple[Ints, Doubles]:
        """(n, width) the nearest of all vectors that score what is needed, by distance and number."""
        ids, distances = np.zeros((len(queries), width), dtype=np.int64), np.full((len(queries), width), np.inf)
        for column, scores in self._tiles(queries, areas):
            row, place = np.nonzero(scores >= needed[:, None])
            some, inverse = _distinct(row)
            near = self._distances(queries, (column + place)[:, None], row)[:, 0]
            ids[some], distances[some] = _sorted(
                beside(ids[some], inverse, column + place, 0), beside(distances[some], inverse, near, np.inf), width
            )
            # Vectors come by their numbers, so nothing takes the place of copies of the query.
            needed[distances[:, -1] == 0] = np.inf
        return ids, distances

    def _tiles(self, queries: Floats, areas: list["_Area"]) -> Iterator[tuple[int, Floats]]:
        """First column and (n, columns) scores; a tile is overwritten by the next one.

        A score is half of |q|² - |q - x|², so the higher the nearer, and minus infinity where a query must not find a vector.
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
        """(n, k) squared distances of queries, or of these rows, to vectors (n, k), each computed alike and alone."""
        rows = np.arange(len(ids)) if rows is None else rows
        result = np.empty(ids.shape)
        step = max(1, PAIRS // ids.shape[1])
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            gaps = np.subtract(self.vectors[ids[part]], queries[rows[part], None], dtype=np.float64)
            result[part] = np.square(gaps, out=gaps).sum(-1)
        return result


class _Area(NamedTuple):
    """Queries and the vectors that none of them must find; both ascending."""

    rows: Ints
    ids: Ints

    def strike_out(self, scores: Floats, column: int) -> None:
        """Let scores be too low to be found."""
        low, high = np.searchsorted(self.ids, (column, column + scores.shape[1]))
        if low == high:
            return
        rows, columns = _span(self.rows), _span(self.ids[low:high] - column)
        both = isinstance(rows, np.ndarray) and isinstance(columns, np.ndarray)
        scores[np.ix_(rows, columns) if both else (rows, columns)] = -np.inf  # type: ignore[arg-type]


class _Best(NamedTuple):
    """The best of each query so far, best first; scores of minus infinity where there are too few."""

    ids: Ints
    scores: Floats

    @classmethod
    def empty(cls, num: int, width: int) -> "_Best":
        return cls(np.zeros((num, width), dtype=np.int64), np.full((num, width), -np.inf, dtype=np.float32))

    def improve(self, column: int, scores: Floats) -> None:
        """Exchange the worst for better ones of a tile; behind the first tiles, few queries have any."""
        wanted, columns = self.scores.shape[1], scores.shape[1]
        width = columns if columns % WIDTH else WIDTH
        highest, worst = torch.from_numpy(scores).view(len(scores), -1, width).amax(2).numpy(), self.scores[:, -1]
        if highest.shape[1] >= wanted and np.isneginf(worst).any():
            # So many blocks have a score as high as this, so what is lower is not among the best.
            high = np.partition(highest, -wanted, axis=1)[:, -wanted]
            worst = np.maximum(worst, np.nextafter(high, np.float32(-np.inf)))
        over = np.flatnonzero(highest > worst[:, None])
        if not len(over):
            return
        values, row = scores.reshape(-1, width)[over], over // highest.shape[1]
        better = np.flatnonzero(values > worst[row, None])
        which, place = np.divmod(better, width)
        some, inverse = _distinct(row[which])
        found = beside(self.ids[some], inverse, column + over[which] % highest.shape[1] * width + place, 0)
        values = beside(self.scores[some], inverse, values.reshape(-1)[better], -np.inf)
        order = np.argsort(-values, axis=1, kind="stable")[:, :wanted]
        self.ids[some], self.scores[some] = np.take_along_axis(found, order, 1), np.take_along_axis(values, order, 1)


def _span(numbers: Ints) -> slice | Ints:
    """Ascending numbers as a slice if they are a run, which is faster."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def _sorted(ids: Ints, distances: Doubles, width: int) -> tuple[Ints, Doubles]:
    """The first of each row by distance and number."""
    order = np.lexsort((ids, distances), axis=1)[:, :width]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)


def _distinct(rows: Ints) -> tuple[Ints, Ints]:
    """The distinct ones of ascending rows, and which of these each is."""
    first = np.diff(rows, prepend=-1) > 0
    return rows[first], np.cumsum(first) - 1


def beside(left: NDArray[Any], rows: Ints, values: NDArray[Any], fill: float) -> NDArray[Any]:
    """(n, w + most) rows with further values behind, as many as each has; `rows`, ascending, says whose they are."""
    counts = np.bincount(rows, minlength=len(left))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    wide = np.full((len(left), left.shape[1] + counts.max(initial=0)), fill, dtype=left.dtype)
    wide[:, : left.shape[1]] = left
    wide[rows, left.shape[1] + place] = values
    return wide
