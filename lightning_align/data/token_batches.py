"""Batches of as many rows as fit into a number of tokens."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from lightning_align.data.batching import LengthGroupedSampler
from lightning_align.data.row_packing import Indices, PackedSampler, PackingPlan, pack_lengths, split_sequences

STEPS = 64
"""Lengths are rounded up to this many different ones. Rows of one rounded length are drawn for each other's batches."""


class TokenBatchSampler(PackedSampler):
    """A sampler that yields the batches of one rank, as lists of row indices with at most so many tokens together.

    Every row occurs once per epoch, and every epoch and every rank has the same number of batches: the rounded lengths in each
    batch are the same in all epochs. Which of the rows of a length stand there, and the order of the batches, are drawn for
    each epoch. (If there are so few rows that the batches cannot be split for all ranks, one batch has a few more tokens.)

    Args:
        lengths: The number of tokens of each row, of shape (rows,). That of a pair counts both sides.
        budget: The largest number of tokens per batch and rank. Padding is not counted.
        grouped: Whether a batch has rows of similar length. If not, long and short rows share a batch.
        num_replicas: The number of ranks.
        rank: The rank of this process.
        seed: The seed of the order.

    Raises:
        ValueError: If a row has more tokens than a batch, or there are fewer rows than ranks.
    """

    def __init__(
        self, lengths: Indices, *, budget: int, grouped: bool, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        longest = int(lengths.max(initial=1))
        if longest > budget:
            raise ValueError(
                f"`batch_tokens` must be at least the tokens of the longest row (of a pair, of both sides), {longest}, but got "
                f"{budget}. Use a larger number, or a smaller `max_length`."
            )
        if len(lengths) < num_replicas:
            raise ValueError(
                f"`num_rows` is {len(lengths)}, which is too few for {num_replicas} processes. Use fewer processes."
            )
        self.row_lengths, self.capacity, self.grouped = _rounded(lengths, longest), budget, grouped
        plan = _consecutive(self.row_lengths, budget) if grouped else pack_lengths(self.row_lengths, budget)
        # Each step takes a batch for each rank, and the last step too.
        self.plan = split_sequences(plan, -(-plan.num_sequences // num_replicas) * num_replicas)
        LengthGroupedSampler.__init__(
            self,
            None,
            num_rows=self.plan.num_sequences,
            batch_size=1,
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
        )

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]  # rows and not sequences of them
        return (np.concatenate(batch).tolist() for batch in super().__iter__())

    @cached_property
    def order(self) -> str:
        """A hash of the lengths and the budget. With the seed and the sizes, it identifies the order."""
        return f"{'grouped' if self.grouped else 'mixed'}-{super().order}"

    def describe(self) -> str:
        """Return how many rows are in how many batches."""
        num_rows, num_batches = len(self.row_lengths), self.plan.num_sequences
        return (
            f"{num_rows:,} rows in {num_batches:,} batches of up to {self.capacity:,} tokens "
            f"({num_rows / num_batches:.1f} rows per batch)"
        )


def _rounded(lengths: Indices, longest: int) -> Indices:
    """Round lengths up, but not above the longest."""
    step = max(1, longest // STEPS)
    return np.minimum(-(-lengths // step) * step, longest)


def _consecutive(lengths: Indices, budget: int) -> PackingPlan:
    """Cut the rows, sorted by length, into batches, the longest rows first, so that the shortest fill the last batch."""
    ends = np.sort(lengths)[::-1].cumsum()
    starts = [0]
    while starts[-1] < len(lengths):
        before = int(ends[starts[-1] - 1]) if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, before + budget, side="right")))
    return PackingPlan(np.arange(len(lengths))[::-1].copy(), np.array(starts, dtype=np.int64))
