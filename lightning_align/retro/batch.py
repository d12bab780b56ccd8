"""Windows of documents with the neighbours of their chunks, and what evaluation compares those neighbours with."""

from collections.abc import Sequence
from typing import Any, NotRequired

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align.generation.noise import uniforms
from lightning_align.retrieval.tables import Bools, ChunkTable, Ints, Neighbors
from lightning_align.retro.model import NeighborTokens
from lightning_align.retro.overlap import overlaps
from lightning_align.types import TokenBatch


class RetrievalBatch(TokenBatch):
    """Windows of U chunks and one token more, which is a target alone; padded on the right to at least a chunk and one token.

    Every token of a document but its first is a target of one window.
    """

    neighbors: NeighborTokens
    """(B, U, J, R) of each full chunk."""
    controls: NotRequired[dict[str, NeighborTokens]]
    """``random`` (any chunks of the database) and ``shuffled`` (the neighbours of another chunk) in place of them."""
    documents: NotRequired[Tensor]
    """(B,) int64 number of each window's document."""
    overlap: NotRequired[Tensor]
    """(B, C) share of each chunk that stands in its neighbours too, see `overlaps`; of each chunk that has a target."""
    chunk_bytes: NotRequired[Tensor]
    """(B, C) UTF-8 bytes of each chunk; 0 of a chunk whose first token alone is a target here, for it has its own window."""


class Windows:
    """How documents are cut in windows of n chunks: a window never spans two documents, and the last may be shorter."""

    def __init__(self, table: ChunkTable, chunks: int, *, deleted: Sequence[int] = ()) -> None:
        """Cut.

        Args:
            table: of the documents.
            chunks: n.
            deleted: numbers of documents that have no windows.
        """
        counts = np.diff(table.chunk_offsets)
        per_document = -(-counts // chunks)
        document = np.repeat(np.arange(len(counts)), per_document)
        number = np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
        first = table.chunk_offsets[document] + number * chunks
        size = table.chunk_size
        rest = (table.token_offsets[document + 1] - table.token_offsets[document]) - number * chunks * size
        kept = rest >= 2  # one token alone is a target of the window before
        if len(deleted):
            there = np.ones(len(counts), np.bool_)
            there[np.asarray(deleted)] = False
            kept &= there[document]
        self.first: Ints = first[kept]
        self.document: Ints = document[kept]
        self.lengths: Ints = np.minimum(rest, chunks * size + 1)[kept]

    def __len__(self) -> int:
        return len(self.first)


class LiveChunks:
    """Chunks of the documents of a database that were not deleted. Pickled, it is a path and a number a document."""

    def __init__(self, table: ChunkTable, deleted: Sequence[int]) -> None:
        """Count them.

        Args:
            table: the database.
            deleted: numbers of documents.
        """
        self.table = table
        counts = np.diff(table.chunk_offsets)
        counts[np.asarray(deleted, dtype=np.int64)] = 0
        self.offsets: Ints = np.concatenate([[0], np.cumsum(counts)])
        """(D + 1,) live chunks before each document, and all of them."""
        self.lacks = len(deleted) > 0
        """Whether any document was deleted."""

    def replace(self, ids: Ints, draws: NDArray[np.float64], own: Ints | None) -> tuple[Ints, Bools]:
        """Random chunks, those of them drawn again that are not to be read: every other chunk is then as likely as before.

        Args:
            ids: (...) drawn from all chunks.
            draws: (...) uniform in [0, 1), for those that are drawn again.
            own: (...) documents of whoever reads, whose chunks are not for them; None where they are not of the database.

        Returns:
            (...) chunks, and whether there is one that may be read.
        """
        document = self.table.document_of(ids)
        bad = self.offsets[document + 1] == self.offsets[document]
        first = last = np.zeros(ids.shape, np.int64)
        if own is not None:
            bad |= document == own
            first, last = self.offsets[own], self.offsets[own + 1]
        count = self.offsets[-1] - (last - first)
        rank = np.minimum((draws * count).astype(np.int64), np.maximum(count - 1, 0))
        rank += np.where(rank >= first, last - first, 0)
        rank = np.minimum(rank, self.offsets[-1] - 1)  # where there is none
        found = np.searchsorted(self.offsets, rank, side="right") - 1
        again = self.table.chunk_offsets[found] + rank - self.offsets[found]
        return np.where(bad, again, ids), count > 0


class RetrievalWindows(Dataset[RetrievalBatch]):
    """Batches by lists of window numbers, which is what the samplers here yield. Pickled, it is paths and window numbers.

    Args:
        table: the documents.
        neighbors: those of their chunks.
        database: the chunks that the neighbours are.
        num_chunks: chunks of a window.
        num_neighbors: J, neighbours of a chunk.
        random_neighbors: share of the neighbours, always the same ones, in whose place random chunks stand, which are of other
            documents.
        deleted: numbers of documents of the database that are not read: neither as windows nor as random neighbours.
        seed: of the random and shuffled neighbours of evaluation; None: training, which needs none.

    Raises:
        ValueError: if the database keeps fewer neighbours.
    """

    def __init__(
        self,
        table: ChunkTable,
        neighbors: Neighbors,
        database: ChunkTable,
        *,
        num_chunks: int,
        num_neighbors: int,
        random_neighbors: float = 0.0,
        deleted: Sequence[int] = (),
        seed: int | None = None,
    ) -> None:
        if num_neighbors > neighbors.k:
            raise ValueError(
                f"num_neighbors is {num_neighbors}, but the database keeps {neighbors.k} neighbours of each chunk: ask for "
                "fewer, or build it with more"
            )
        self.table, self.neighbors, self.database = table, neighbors, database
        self.own = table.folder == database.folder
        """Whether the documents are the database's, so that chunks must not read their own document."""
        self.windows = Windows(table, num_chunks, deleted=deleted if self.own else ())
        self.live = LiveChunks(database, deleted)
        self.num_chunks, self.num_neighbors, self.random_neighbors = num_chunks, num_neighbors, random_neighbors
        self.batches: list[list[int]] | None = None
        """Lists of windows that a plain sampler may ask for by their number; None where the sampler yields the lists."""
        self.controls: dict[str, tuple[Ints, Bools]] = {}
        self.overlap: NDArray[np.float32] | None = None
        if seed is not None:
            # Tables keyed by chunk: what is evaluated does not depend on how it is batched, nor on the number of ranks.
            random, shape = np.random.default_rng(seed), (len(table), num_neighbors)
            drawn = random.integers(0, len(database), shape)
            order = random.permutation(len(table))
            own = np.broadcast_to(table.document_of(np.arange(len(table)))[:, None], shape) if self.own else None
            self.controls["random"] = self.live.replace(drawn, random.random(shape), own)
            self.controls["shuffled"] = neighbors.ids[order, :num_neighbors], neighbors.mask[order, :num_neighbors]
            self.overlap = overlaps(table, neighbors, database)

    def __len__(self) -> int:
        return len(self.windows) if self.batches is None else len(self.batches)

    def __getitem__(self, index: Sequence[int] | int) -> RetrievalBatch:
        if isinstance(index, int):
            assert self.batches is not None
            index = self.batches[index]
        chosen, size = np.asarray(index), self.table.chunk_size
        width = max(int(self.windows.lengths[chosen].max()), size + 1)
        first = self.windows.first[chosen]
        ids, mask = self.table.gather(first, width)
        # A window does not go on into the next one, save for its last target.
        mask = mask & (np.arange(width) < self.windows.lengths[chosen][:, None])
        targets = mask.copy()
        targets[:, 0] = False
        chunks = first[:, None] + np.arange((width - 1) // size)
        exists = np.arange(chunks.shape[1]) < -(-self.windows.lengths[chosen][:, None] // size)
        chunks = np.where(exists, chunks, 0)
        batch: dict[str, Any] = {
            "tokens": torch.from_numpy(ids),
            "mask": torch.from_numpy(mask),
            "targets": torch.from_numpy(targets),
            "rows": torch.from_numpy(chosen),
            "neighbors": self._gather(*self._found(chunks), exists),
        }
        if self.overlap is not None:
            batch["controls"] = {
                name: self._gather(ids[chunks], mask[chunks], exists) for name, (ids, mask) in self.controls.items()
            }
            batch["documents"] = torch.from_numpy(self.windows.document[chosen])
            ends = self.table.chunk_offsets[self.windows.document[chosen] + 1][:, None]
            own = first[:, None] + np.arange((width - 1) // size + 1)
            here = (own < ends) & (np.arange(own.shape[1]) < self.num_chunks)
            own = np.minimum(own, ends - 1)
            batch["overlap"] = torch.from_numpy(self.overlap[own])
            batch["chunk_bytes"] = torch.from_numpy(np.where(here, self.table.num_bytes[own], 0).astype(np.int64))
        return batch  # type: ignore[return-value]  # its keys are those of the type

    def _found(self, chunks: Ints) -> tuple[Ints, Bools]:
        """Neighbours of chunks (B, U), some of them random ones: (B, U, J)."""
        count = self.num_neighbors
        ids, mask = self.neighbors.ids[chunks, :count], self.neighbors.mask[chunks, :count]
        if self.random_neighbors:
            keys = chunks.ravel().tolist()
            drawn = uniforms([(chunk,) for chunk in keys], positions=count, draws=2)
            numbers = drawn.double().numpy().reshape(*chunks.shape, count, 2)
            chosen, random = (numbers[..., 1] * len(self.database)).astype(np.int64), numbers[..., 0] < self.random_neighbors
            if self.own or self.live.lacks:  # else every chunk may be read, and there is nothing to draw again
                again = uniforms([(chunk, 1) for chunk in keys], positions=count, draws=1)
                own = np.broadcast_to(self.table.document_of(chunks)[..., None], ids.shape) if self.own else None
                chosen, there = self.live.replace(chosen, again.double().numpy().reshape(ids.shape), own)
                random &= there
            ids = np.where(random, chosen, ids)
            mask = mask | random
        return ids, mask

    def _gather(self, ids: Ints, mask: Bools, exists: Bools) -> NeighborTokens:
        """Tokens of neighbours (B, U, J), none of chunks that do not exist."""
        there = mask & exists[..., None]
        tokens = self.database.gather(np.where(there, ids, 0), 2 * self.table.chunk_size)
        return NeighborTokens(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask & there[..., None]))
