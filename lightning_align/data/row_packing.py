"""Packing of rows into sequences: which rows share a sequence, their order in each epoch, and their batches.

Rows are whole and keep their own positions. The document numbers of a batch say which tokens belong to which row, so that
attention can stay inside each row (`lightning_align.models.documents`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_align.data.batching import LengthGroupedSampler
from lightning_align.data.store import StoredRow, TokenStore
from lightning_align.types import TokenBatch

Indices = np.ndarray[Any, np.dtype[np.int64]]


class PackingPlan(NamedTuple):
    """Sequences and the lengths of the rows in them, without the rows themselves.

    A place is an index into the rows when they are sorted by length. Any rows of the same length can stand in their places.
    """

    places: Indices
    """(rows,) the places of all sequences, one sequence after the other."""
    starts: Indices
    """(sequences + 1,) the index in ``places`` at which each sequence starts, and their number."""

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return len(self.starts) - 1


def pack_lengths(lengths: Indices, capacity: int, *, at_least: int = 1) -> PackingPlan:
    """Pack rows into sequences by best-fit decreasing.

    Rows are taken from the longest to the shortest. Each goes to the sequence with the least free space in which it fits, or to
    a new one. Rows of the same length are placed together, so the time grows with the number of different lengths.

    Args:
        lengths: The number of tokens of each row, of shape (rows,).
        capacity: The largest number of tokens per sequence.
        at_least: The least number of sequences. With fewer sequences, those with the most rows are split.

    Raises:
        ValueError: If a row is longer than a sequence.
    """
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        raise ValueError(f"`capacity` must be at least the length of the longest row, {longest}, but got {capacity}.")
    counts = np.bincount(lengths, minlength=capacity + 1)
    first_places = counts.cumsum() - counts
    free: dict[int, list[Indices]] = {}  # sequences by their number of free tokens
    num_free = np.zeros(capacity + 1, dtype=np.int64)
    members: list[tuple[Indices, Indices]] = []  # the sequence of each place, and the places
    num_sequences = 0

    def keep(sequences: Indices, space: int) -> None:
        if len(sequences) and space:
            free.setdefault(space, []).append(sequences)
            num_free[space] += len(sequences)

    for length in range(longest, 0, -1):
        place, left = int(first_places[length]), int(counts[length])
        while left:
            space = length + int((num_free[length:] > 0).argmax())
            if not num_free[space]:
                space = capacity
                sequences = np.arange(num_sequences, num_sequences - (-left // (capacity // length)))
                num_sequences += len(sequences)
            else:
                sequences = np.concatenate(free.pop(space))
                num_free[space] = 0
            per_sequence = space // length
            num_full, rest = divmod(min(left, per_sequence * len(sequences)), per_sequence)
            taken = np.repeat(sequences[: num_full + 1], per_sequence)[: num_full * per_sequence + rest]
            members.append((taken, np.arange(place, place + len(taken))))
            place, left = place + len(taken), left - len(taken)
            keep(sequences[:num_full], space - per_sequence * length)
            keep(sequences[num_full : num_full + 1], space - rest * length)
            keep(sequences[num_full + 1 :], space)
    if not members:
        return PackingPlan(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    sequence_of = np.concatenate([sequences for sequences, _ in members])
    places = np.concatenate([places for _, places in members])[sequence_of.argsort(kind="stable")]
    starts = np.concatenate([[0], np.bincount(sequence_of, minlength=num_sequences).cumsum()])
    return split_sequences(PackingPlan(places, starts), at_least)


def split_sequences(plan: PackingPlan, number: int) -> PackingPlan:
    """Split the sequences with the most rows until there are so many, or each has one row.

    Args:
        plan: The sequences.
        number: The least number of sequences.
    """
    starts = plan.starts
    while len(starts) <= number and (sizes := np.diff(starts)).max() > 1:
        largest = int(sizes.argmax())
        starts = np.insert(starts, largest + 1, starts[largest] + sizes[largest] // 2)
    return PackingPlan(plan.places, starts)


class PackedSampler(LengthGroupedSampler):
    """A sampler that yields the batches of one rank, as lists of sequences, each an array of row indices.

    Every row occurs once per epoch, and every epoch and every rank has the same number of batches: the lengths in each sequence
    are the same in all epochs. Which of the rows of a length stand there, and the order of the sequences, are drawn for each
    epoch. The global batches depend only on the lengths, the seed, the epoch and the global batch size. (If there are fewer
    sequences than ranks, they are split, so that no rank is without one. Only then do they depend on the number of ranks.)

    Args:
        lengths: The length of each row, of shape (rows,).
        capacity: The largest number of tokens per sequence.
        batch_size: The number of sequences per batch and rank.
        num_replicas: The number of ranks.
        rank: The rank of this process.
        shuffle: Whether to draw rows and order in each epoch. If false, every epoch is the same.
        seed: The seed of the order.

    Raises:
        ValueError: See `LengthGroupedSampler` and `pack_lengths`.
    """

    def __init__(
        self,
        lengths: Indices,
        *,
        capacity: int,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.row_lengths, self.capacity = lengths, capacity
        self.plan = pack_lengths(lengths, capacity, at_least=num_replicas)
        super().__init__(
            None,
            num_rows=self.plan.num_sequences,
            batch_size=batch_size,
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
        )

    def __iter__(self) -> Iterator[list[Indices]]:  # type: ignore[override]  # a batch has sequences instead of rows
        rows, starts = self.epoch_rows(), self.plan.starts
        # A generator of batches: only those that were asked for exist.
        return (
            [rows[starts[sequence] : starts[sequence + 1]] for sequence in batch[self.rank :: self.num_replicas]]
            for batch in self.global_batches()[self.start :]
        )

    def rank_batches(self) -> Any:
        """Return the batches of this rank, each as a list of sequences, each an array of row indices."""
        return list(self)

    def epoch_rows(self) -> Indices:
        """Return the rows of all sequences in the current epoch, (rows,), one sequence after the other."""
        num_rows = len(self.row_lengths)
        # The third number makes them independent of the order of the sequences, which the base class draws.
        order = np.random.default_rng([self.seed, self.epoch, 1]).permutation(num_rows) if self.shuffle else np.arange(num_rows)
        # Sorting integers of 16 bits takes linear time.
        lengths = self.row_lengths.astype(np.min_scalar_type(self.capacity))
        by_length: Indices = order[lengths[order].argsort(kind="stable")]
        return by_length[self.plan.places]

    @cached_property
    def order(self) -> str:
        """A hash of the lengths and the capacity. With the seed and the sizes, it identifies the order."""
        lengths = np.ascontiguousarray(self.row_lengths, dtype=np.int64).tobytes()
        return f"packed-{self.capacity}-{hashlib.sha256(lengths).hexdigest()[:16]}"

    def describe(self) -> str:
        """Return how many rows are packed into how many sequences, and the share of padding."""
        num_rows, num_sequences = len(self.row_lengths), self.plan.num_sequences
        padding = 1 - int(self.row_lengths.sum()) / (num_sequences * self.capacity)
        return (
            f"{num_rows:,} rows packed into {num_sequences:,} sequences of up to {self.capacity:,} tokens "
            f"({num_rows / num_sequences:.1f} rows per sequence, {padding:.1%} padding)"
        )


class Sequences(Dataset[list[StoredRow]]):
    """The rows of a store, read by sequence: an array of row indices gives the list of these rows.

    Args:
        store: The store of the rows.
    """

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, rows: Sequence[int]) -> list[StoredRow]:
        return [self.store[int(row)] for row in rows]


def collate_packed(sequences: Sequence[Sequence[StoredRow]], *, pad_id: int) -> TokenBatch:
    """Join the rows of each sequence and pad the sequences on the right.

    Args:
        sequences: The B sequences of the batch, each with the rows that it consists of.
        pad_id: The id that fills the shorter sequences.

    Returns:
        The batch, with tensors of shape (B, N), where N is the length of the longest sequence, and ``document_ids``, which
        numbers the R rows of the batch. ``rows`` and ``num_bytes`` have shape (R,).
    """
    width = max(sum(len(row.sides[0].tokens) for row in rows) for rows in sequences)
    shape = (len(sequences), width)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    targets = np.zeros(shape, dtype=np.bool_)
    documents = np.full(shape, -1, dtype=np.int64)
    document = 0
    for i, rows in enumerate(sequences):
        start = 0
        for row in rows:
            stop = start + len(row.sides[0].tokens)
            tokens[i, start:stop] = row.sides[0].tokens
            targets[i, start:stop] = row.sides[0].targets
            documents[i, start:stop] = document
            document, start = document + 1, stop
    packed = [row for rows in sequences for row in rows]
    return {
        "tokens": torch.from_numpy(tokens),
        "mask": torch.from_numpy(documents >= 0),
        "targets": torch.from_numpy(targets),
        "document_ids": torch.from_numpy(documents),
        "num_bytes": torch.tensor([row.sides[0].num_bytes for row in packed]),
        "rows": torch.tensor([row.row for row in packed]),
    }
