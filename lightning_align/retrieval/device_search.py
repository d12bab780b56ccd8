"""Exact search on a device, with the results of `ExactSearch` bit for bit.

Only the scores are computed on the device. They select candidates, whose distances the CPU computes in float64, as it does for
its own scores. A bound on the rounding of the scores tells which queries must be searched again. So neither the numbers of the
neighbors nor their distances depend on the device, nor on the shapes of tiles.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lightning_align.retrieval.exact import FEW, Best, Doubles, ExactSearch, joined
from lightning_align.retrieval.neighbors import Forbidden, Nearest
from lightning_align.retrieval.stages import Team
from lightning_align.retrieval.tables import Floats, Ints

ROWS, TILE_BYTES = 8192, 1 << 30
"""Queries that are compared at a time, and bytes of a tile of float32 scores. A tile with fewer rows has more columns."""
TABLE_BYTES = 64 << 20
"""Bytes of the table of which queries may not find which groups. With more groups, fewer queries are compared at a time."""
SHARE = 0.5
"""Share of the free memory of the device that all vectors may take. Otherwise they are copied tile by tile for each search."""
DEVICES = ("cuda", "xpu")
"""The types of devices that searches run on."""


class DeviceSearch(ExactSearch):
    """Compares queries with all vectors of a database on a device.

    Args:
        vectors: (C, d), can be memory-mapped.
        groups: (C,) group of each vector's document, negative for deleted documents, which no query may find.
        device: The device that computes the scores.
        memory: Bytes of the device that vectors and tiles may take. Default is half of what is free.
    """

    def __init__(self, vectors: Floats, groups: Ints, *, device: torch.device, memory: int | None = None) -> None:
        super().__init__(vectors, groups)
        self.device, self.groups = device, groups
        self._memory = free_memory(device) if memory is None else memory
        # The highest scores of a tile are looked for in it, which takes about three times its own memory.
        self._tile = max(1, min(TILE_BYTES, self._memory // 16) // 4)
        """Scores of a tile."""
        self.resident = 4 * vectors.size + 4 * 4 * self._tile <= self._memory
        """Whether all vectors stay on the device."""

    def nearest(self, queries: Floats, k: int, forbidden: Forbidden) -> Nearest:
        """See `Searcher`."""
        kinds = len(np.unique(forbidden.groups))
        size = max(1, min(ROWS, TABLE_BYTES // (kinds + 1), self._tile))
        assert np.isfinite(self._largest)  # computes it
        parts = []
        for start in range(0, len(queries), size):
            mine = (forbidden.rows >= start) & (forbidden.rows < start + size)
            some = Forbidden(forbidden.rows[mine] - start, forbidden.groups[mine])
            parts.append(self._nearest(queries[start : start + size], k, some))
        return joined(parts, k)

    @cached_property
    def _placed(self) -> tuple[Tensor | None, Tensor]:
        """All vectors on the device, if they fit, and their shifts."""
        vectors = torch.from_numpy(np.asarray(self.vectors)).to(self.device) if self.resident else None
        return vectors, torch.from_numpy(self._shift).to(self.device)

    def _best(self, queries: Floats, wanted: int, forbidden: Forbidden) -> Best:
        """See `ExactSearch`."""
        ids = torch.zeros(len(queries), wanted, dtype=torch.long, device=self.device)
        best = torch.full((len(queries), wanted), -torch.inf, dtype=torch.float32, device=self.device)
        with exact_products():
            for start, scores in self._scores(queries, forbidden):
                values, places = scores.topk(min(wanted, scores.shape[1]), dim=1)
                best, order = torch.cat([best, values], dim=1).topk(wanted, dim=1)
                ids = torch.cat([ids, places + start], dim=1).gather(1, order)
        return Best(ids.cpu().numpy(), best.cpu().numpy())

    def _above(self, queries: Floats, needed: Doubles, forbidden: Forbidden) -> Iterator[tuple[Ints, Ints]]:
        """See `ExactSearch`."""
        # Rounded down, so that no score that is high enough is left out.
        for start, scores in self._scores(queries, forbidden):
            least = needed.astype(np.float32)
            least = np.where(least > needed, np.nextafter(least, np.float32(-np.inf)), least)
            row, place = (scores >= torch.from_numpy(least).to(self.device)[:, None]).nonzero(as_tuple=True)
            yield row.cpu().numpy(), place.cpu().numpy() + start

    def _distances(self, queries: Floats, ids: Ints, rows: Ints | None = None) -> Doubles:
        """See `ExactSearch`. Each distance is computed alone, so several threads find the same."""
        threads = torch.get_num_threads()
        size = -(-len(ids) // threads)
        if threads == 1 or len(ids) < FEW:
            return super()._distances(queries, ids, rows)
        rows = np.arange(len(ids)) if rows is None else rows
        own = super()._distances
        with ThreadPoolExecutor(threads) as pool:
            parts = [slice(start, start + size) for start in range(0, len(ids), size)]
            return np.concatenate(list(pool.map(lambda part: own(queries, ids[part], rows[part]), parts)))

    def _scores(self, queries: Floats, forbidden: Forbidden) -> Iterator[tuple[int, Tensor]]:
        """Yield the first column and the scores (n, columns) of each tile, with minus infinity at forbidden vectors."""
        kinds, kind = np.unique(forbidden.groups, return_inverse=True)
        table = torch.zeros(len(queries), len(kinds) + 1, dtype=torch.bool)
        table[torch.from_numpy(forbidden.rows), torch.from_numpy(kind.reshape(-1)) + 1] = True
        table = table.to(self.device)
        vectors, shift = self._placed
        points = torch.from_numpy(np.ascontiguousarray(queries)).to(self.device)
        columns = max(1, self._tile // len(queries))
        for start in range(0, len(self.vectors), columns):
            stop = min(start + columns, len(self.vectors))
            part = torch.from_numpy(self.vectors[start:stop]).to(self.device) if vectors is None else vectors[start:stop]
            with exact_products(), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                scores = torch.addmm(shift[start:stop], points, part.T)
                if len(kinds):
                    place = np.minimum(np.searchsorted(kinds, self.groups[start:stop]), len(kinds) - 1)
                    column = np.where(kinds[place] == self.groups[start:stop], place + 1, 0)
                    if column.any():
                        scores.masked_fill_(table.index_select(1, torch.from_numpy(column).to(self.device)), -torch.inf)
            yield start, scores


def exact_search(vectors: Floats, groups: Ints, device: torch.device | None) -> ExactSearch:
    """Create the exact search for a device.

    Args:
        vectors: (C, d), can be memory-mapped.
        groups: (C,) group of each vector's document, see `ExactSearch`.
        device: The device. None, and a device that is not in `DEVICES`, search on the CPU.
    """
    if device is None or device.type not in DEVICES:
        return ExactSearch(vectors, groups)
    return DeviceSearch(vectors, groups, device=device)


def search_device(make_trainer: Callable[[], L.Trainer], team: Team) -> torch.device | None:
    """Return the device of this rank that searches, or None for the CPU. Rank 0 decides for all ranks. Call it on all.

    Args:
        make_trainer: Creates a Trainer on the devices of the ranks.
        team: The ranks.
    """
    with team.together():
        device = make_trainer().strategy.root_device if torch.accelerator.is_available() else torch.device("cpu")
    kind = team.share(device.type)
    return device if kind == device.type and kind in DEVICES else None


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device that a search may take."""
    if device.type == "cpu":
        return 1 << 40
    return int(SHARE * torch.accelerator.get_memory_info(device)[0])


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute products of float32 in float32 within a ``with`` block, and not in TF32, whatever the user has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
