"""The dataset of RETRO: windows of documents with the neighbors of their chunks, and control neighbors for evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, NotRequired

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align.data.batching import RepeatedSampler
from lightning_align.generation.noise import uniforms
from lightning_align.retrieval.tables import Bools, ChunkTable, Ints, Neighbors
from lightning_align.retro.model import NeighborTokens
from lightning_align.retro.overlap import overlaps
from lightning_align.types import TokenBatch


class RetrievalBatch(TokenBatch):
    """Windows of U chunks and one more token, which is only a target.

    Windows are padded on the right, to at least one chunk and one token. Each token of a document except its first is a target
    of exactly one window.
    """

    neighbors: NeighborTokens
    """(B, U, J, R) neighbors of each chunk of the window."""
    neighbor_lengths: NotRequired[Ints]
    """(B, U, J) number of real tokens of each neighbor, on the host. With it, they are read on a GPU without their padding."""
    controls: NotRequired[dict[str, NeighborTokens]]
    """Control neighbors: ``random`` (random chunks of the database) and ``shuffled`` (the neighbors of another chunk)."""
    documents: NotRequired[Tensor]
    """(B,) int64 number of the document of each window."""
    overlap: NotRequired[Tensor]
    """(B, C) overlap of each chunk that has a target with its neighbors, see `overlaps`."""
    chunk_bytes: NotRequired[Tensor]
    """(B, C) UTF-8 bytes of each chunk. 0 for the chunk after the window, of which only the first token is a target here."""


def without_last(batch: RetrievalBatch) -> TokenBatch:
    """Return the tokens that the model reads: all columns but the last, whose tokens are only targets.

    Args:
        batch: The windows.
    """
    read: TokenBatch = {"tokens": batch["tokens"][:, :-1], "mask": batch["mask"][:, :-1], "targets": batch["targets"][:, :-1]}
    if "lengths" in batch:
        read["lengths"] = [min(length, read["tokens"].shape[1]) for length in batch["lengths"]]
    return read


def count_neighbors(collate: Callable[[Any], Any], batch: Any) -> Any:
    """Add the numbers of tokens of the neighbors to a batch on the CPU.

    Args:
        collate: What is done with the batch before.
        batch: A `RetrievalBatch`.
    """
    batch = collate(batch)
    return {**batch, "neighbor_lengths": batch["neighbors"].mask.sum(-1).numpy()}


class Windows:
    """The windows of n chunks of some documents. A window never spans two documents. The last of a document may be shorter."""

    def __init__(self, table: ChunkTable, chunks: int, *, deleted: Sequence[int] = ()) -> None:
        """Cut the documents into windows.

        Args:
            table: The chunks of the documents.
            chunks: n, the number of chunks per window.
            deleted: The numbers of documents that get no windows.
        """
        counts = np.diff(table.chunk_offsets)
        per_document = -(-counts // chunks)
        document = np.repeat(np.arange(len(counts)), per_document)
        number = np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
        first = table.chunk_offsets[document] + number * chunks
        size = table.chunk_size
        rest = (table.token_offsets[document + 1] - table.token_offsets[document]) - number * chunks * size
        kept = rest >= 2  # a single token is already a target of the previous window
        if len(deleted):
            live = np.ones(len(counts), np.bool_)
            live[np.asarray(deleted)] = False
            kept &= live[document]
        self.first: Ints = first[kept]
        self.document: Ints = document[kept]
        self.lengths: Ints = np.minimum(rest, chunks * size + 1)[kept]

    def __len__(self) -> int:
        return len(self.first)


class LiveChunks:
    """The chunks of the documents of a database that were not deleted.

    Pickling it stores only a path and one number per document.
    """

    def __init__(self, table: ChunkTable, deleted: Sequence[int]) -> None:
        """Count the live chunks.

        Args:
            table: The chunks of the database.
            deleted: The numbers of the deleted documents.
        """
        self.table = table
        counts = np.diff(table.chunk_offsets)
        counts[np.asarray(deleted, dtype=np.int64)] = 0
        self.offsets: Ints = np.concatenate([[0], np.cumsum(counts)])
        """(D + 1,) number of live chunks before each document, and their total."""
        self.any_deleted = len(deleted) > 0
        """Whether any document was deleted."""

    def replace(self, ids: Ints, draws: NDArray[np.float64], own: Ints | None) -> tuple[Ints, Bools]:
        """Replace those of some random chunks that must not be used. All allowed chunks stay equally likely.

        Chunks of deleted documents, and of the document that a draw is for, must not be used.

        Args:
            ids: (...) chunk numbers, drawn uniformly from all chunks.
            draws: (...) uniform random numbers in [0, 1) for the replacements.
            own: (...) number of the document that each draw is for. None if these documents are not in the database.

        Returns:
            (...) chunk numbers, and whether any chunk is allowed.
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
        rank = np.minimum(rank, self.offsets[-1] - 1)  # keeps the index valid where no chunk is allowed
        found = np.searchsorted(self.offsets, rank, side="right") - 1
        replacement = self.table.chunk_offsets[found] + rank - self.offsets[found]
        return np.where(bad, replacement, ids), count > 0


class RetrievalWindows(Dataset[RetrievalBatch]):
    """The windows of some documents with their neighbors. An item is a batch, and its index is a list of window numbers.

    The samplers of this package yield such lists. Pickling the dataset stores only paths and window numbers.

    Args:
        table: The chunks of the documents.
        neighbors: The neighbors of these chunks.
        database: The chunks of the database that the neighbors are in.
        num_chunks: The maximum number of chunks per window.
        num_neighbors: J, the number of neighbors per chunk.
        random_neighbors: The share of the neighbors that are replaced by random chunks of other documents. The same neighbors
            are replaced in each epoch.
        deleted: The numbers of deleted documents of the database. They are used neither as windows nor as random neighbors.
        seed: The seed of the random and shuffled neighbors of evaluation. None for training, which needs no controls.

    Raises:
        ValueError: If the database has fewer than `num_neighbors` neighbors per chunk.
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
                f"`num_neighbors` must be at most {neighbors.k}, the number of neighbors per chunk in the database, but got "
                f"{num_neighbors}. Use a smaller value, or build the database with a larger k."
            )
        # A compaction by another process can remove the files while this one trains.
        self.table, self.neighbors, self.database = table.hold(), neighbors.hold(), database.hold()
        self.own = table.folder == database.folder
        """Whether the documents are those of the database. Chunks must then not use their own document as a neighbor."""
        self.windows = Windows(table, num_chunks, deleted=deleted if self.own else ())
        self.live = LiveChunks(database, deleted)
        self.num_chunks, self.num_neighbors, self.random_neighbors = num_chunks, num_neighbors, random_neighbors
        self.batches: RepeatedSampler | None = None
        """The batches that a sampler selects by number. None if the sampler yields lists of window numbers itself."""
        self.controls: dict[str, tuple[Ints, Bools]] = {}
        self.overlap: NDArray[np.float32] | None = None
        if seed is not None:
            # Draw the controls per chunk, so that they do not depend on the batches or on the number of ranks.
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
        # Mask the tokens of the next window, except the first, which is the last target of this window.
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
        return batch  # type: ignore[return-value]  # its keys match the TypedDict

    def _found(self, chunks: Ints) -> tuple[Ints, Bools]:
        """Look up the neighbors of chunks (B, U) and replace some by random chunks: ids and mask, each (B, U, J)."""
        count = self.num_neighbors
        ids, mask = self.neighbors.ids[chunks, :count], self.neighbors.mask[chunks, :count]
        if self.random_neighbors:
            keys = chunks.ravel().tolist()
            drawn = uniforms([(chunk,) for chunk in keys], positions=count, draws=2)
            numbers = drawn.double().numpy().reshape(*chunks.shape, count, 2)
            chosen, random = (numbers[..., 1] * len(self.database)).astype(np.int64), numbers[..., 0] < self.random_neighbors
            if self.own or self.live.any_deleted:  # otherwise every chunk is allowed
                redraws = uniforms([(chunk, 1) for chunk in keys], positions=count, draws=1)
                own = np.broadcast_to(self.table.document_of(chunks)[..., None], ids.shape) if self.own else None
                chosen, allowed = self.live.replace(chosen, redraws.double().numpy().reshape(ids.shape), own)
                random &= allowed
            ids = np.where(random, chosen, ids)
            mask = mask | random
        return ids, mask

    def _gather(self, ids: Ints, mask: Bools, exists: Bools) -> NeighborTokens:
        """Gather the tokens of neighbors (B, U, J). `exists` (B, U) is false for chunks that are not in the window."""
        present = mask & exists[..., None]
        tokens = self.database.gather(np.where(present, ids, 0), 2 * self.table.chunk_size)
        return NeighborTokens(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask & present[..., None]))
