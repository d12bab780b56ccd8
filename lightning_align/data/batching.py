"""Grouping rows into batches, padding them, and a loader that can resume in the middle of an epoch.

A global batch holds the rows of all ranks in one step. It depends only on the seed, the epoch and the global batch size.
Each rank takes its part. One process with batches of 8 and two processes with batches of 4 therefore train on the same
rows in the same steps.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast, overload

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_align.data.store import StoredRow, StoredTokens, TokenStore
from lightning_align.types import PreferenceBatch, PromptBatch, TokenBatch

Indices = np.ndarray[Any, np.dtype[np.int64]]
_BATCHES_SORTED_TOGETHER = 64
"""The number of global batches in a group of rows that is sorted by length."""


def collate_tokens(rows: Sequence[StoredRow], *, pad_id: int) -> TokenBatch:
    """Pad the first side of each row on the right.

    Args:
        rows: The B rows of the batch.
        pad_id: The id that fills the shorter rows.

    Returns:
        The batch, with tensors of shape (B, N), where N is the length of the longest row.
    """
    return _pad([row.sides[0] for row in rows], rows, pad_id=pad_id)


def collate_pairs(rows: Sequence[StoredRow], *, pad_id: int) -> PreferenceBatch:
    """Pad pairs on the right, each side to the length of its longest row.

    The batch has ``weights`` only if a weight differs from 1, and ``margins`` only if a margin differs from 0.

    Args:
        rows: The B pairs of the batch.
        pad_id: The id that fills the shorter rows.
    """
    batch: PreferenceBatch = {
        "chosen": _pad([row.sides[0] for row in rows], rows, pad_id=pad_id),
        "rejected": _pad([row.sides[1] for row in rows], rows, pad_id=pad_id),
    }
    if any(row.weight != 1 for row in rows):
        batch["weights"] = torch.tensor([row.weight for row in rows])
    if any(row.margin != 0 for row in rows):
        batch["margins"] = torch.tensor([row.margin for row in rows])
    return batch


def collate_prompts(rows: Sequence[StoredRow]) -> PromptBatch:
    """Collect the prompts as lists of ids, without the responses."""
    prompts = [row.sides[0].tokens[: row.num_prompt].tolist() for row in rows]
    return {"prompts": prompts, "rows": torch.tensor([row.row for row in rows])}


def _pad(sides: Sequence[StoredTokens], rows: Sequence[StoredRow], *, pad_id: int) -> TokenBatch:
    lengths = torch.tensor([len(side.tokens) for side in sides])
    width = int(lengths.max())
    tokens = np.full((len(sides), width), pad_id, dtype=np.int64)
    targets = np.zeros((len(sides), width), dtype=np.bool_)
    for i, side in enumerate(sides):
        tokens[i, : len(side.tokens)] = side.tokens
        targets[i, : len(side.targets)] = side.targets
    return {
        "tokens": torch.from_numpy(tokens),
        # Computed from the lengths, because the padding id may also be the id of a real token.
        "mask": torch.arange(width) < lengths[:, None],
        "targets": torch.from_numpy(targets),
        "num_bytes": torch.tensor([side.num_bytes for side in sides]),
        "rows": torch.tensor([row.row for row in rows]),
    }


class RowLists(Dataset[list[StoredRow]]):
    """A dataset that returns the rows of a store for a list of indices.

    Args:
        store: The store of the rows.
        batches: The row indices of each batch, for samplers that yield the number of a batch. None if the sampler yields the
            lists of row indices itself.
    """

    def __init__(self, store: TokenStore, batches: "RepeatedSampler | None" = None) -> None:
        self.store = store
        self.batches = batches

    def __len__(self) -> int:
        return len(self.store) if self.batches is None else len(self.batches)

    def __getitem__(self, index: Sequence[int] | int) -> list[StoredRow]:
        if isinstance(index, int):
            assert self.batches is not None
            # The batches of packed sequences hold an array of rows for each sequence.
            return [self.store[int(row) if np.ndim(row) == 0 else row] for row in self.batches[index]]
        return [self.store[row] for row in index]


class IndexBatches(Sequence["Indices"]):
    """Batches of row indices in one array, as a sequence of arrays.

    Args:
        whole_BN: The batches of equal size, of shape (batches, rows).
        last: The last batch if it has another size.
    """

    def __init__(self, whole_BN: Indices, last: Indices | None = None) -> None:
        self.whole_BN = whole_BN
        self.last = last

    def __len__(self) -> int:
        return len(self.whole_BN) + int(self.last is not None)

    @overload
    def __getitem__(self, index: int) -> Indices: ...

    @overload
    def __getitem__(self, index: slice) -> "IndexBatches": ...

    def __getitem__(self, index: int | slice) -> "Indices | IndexBatches":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1 or stop < len(self):
                raise ValueError(f"`index` must be a slice up to the end, but got {index}. Take single batches.")
            return IndexBatches(self.whole_BN[start:], self.last if start < len(self) else None)
        place = range(len(self))[index]
        return self.whole_BN[place] if self.last is None or place < len(self.whole_BN) else self.last

    def share(self, rank: int, num_ranks: int) -> "IndexBatches":
        """Return the part of a rank: every n-th row of each batch, where n is the number of ranks."""
        last = None if self.last is None else self.last[rank::num_ranks]
        return IndexBatches(self.whole_BN[:, rank::num_ranks], last)


class LengthGroupedSampler(DistributedSampler[list[int]]):
    """A sampler that yields the batches of one rank, as lists of row indices, with rows of similar length together.

    Every row occurs once per epoch, and every rank has the same number of batches. The rows of an epoch are shuffled and
    split into groups of 64 global batches. Each group is sorted by length and split into batches. Then all batches are
    shuffled.

    The last global batch may be smaller. The ranks' parts of it may then differ by one row. If it has fewer rows than
    there are ranks, its rows are added to the batch before it, so that no rank is without a row. Only in this case do the
    global batches depend on the number of ranks.

    The class is a `DistributedSampler`, so the Trainer does not replace it and calls `set_epoch`.

    Args:
        lengths: The length of each row, of shape (rows,). None does not group rows by length.
        num_rows: The number of rows.
        batch_size: The number of rows per batch and rank.
        num_replicas: The number of ranks.
        rank: The rank of this process.
        shuffle: Whether to shuffle the rows in each epoch. If false, every epoch has the same order.
        seed: The seed of the shuffling.
        drop_last: Whether to drop the rows that do not fill a global batch. With ``shuffle``, different rows are dropped
            in each epoch.

    Raises:
        ValueError: If ``batch_size`` is less than 1, or there are too few rows for every rank.
    """

    def __init__(
        self,
        lengths: np.ndarray[Any, Any] | None,
        *,
        num_rows: int,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but got {batch_size}")
        self.global_batch_size = batch_size * num_replicas
        if num_rows < (self.global_batch_size if drop_last else num_replicas):
            raise ValueError(
                f"`num_rows` is {num_rows}, which is too few for batch_size {batch_size} on {num_replicas} processes. Use"
                " fewer processes or smaller batches."
            )
        rows = cast(Dataset[list[int]], range(num_rows))
        super().__init__(rows, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.num_rows = num_rows
        self.start = 0
        """The number of batches to skip at the start of an epoch. A resumed loader sets it for one iteration."""
        self._lengths = lengths

    def __len__(self) -> int:
        num_whole, num_rest = divmod(self.num_rows, self.global_batch_size)
        return num_whole + int(not self.drop_last and self._has_own_batch(num_rest))

    def __iter__(self) -> Iterator[list[int]]:
        # A generator would compute the batches later, after `start` was reset.
        return (batch.tolist() for batch in self.rank_batches()[self.start :])

    def rank_batches(self) -> IndexBatches:
        """Compute this rank's batches of the current epoch, as arrays of row indices."""
        # The stride gives each rank both long and short rows of a batch.
        return self.global_batches().share(self.rank, self.num_replicas)

    @cached_property
    def order(self) -> str:
        """A hash of the lengths, or "ungrouped" without lengths. With the seed and the sizes, it identifies the order."""
        if self._lengths is None:
            return "ungrouped"
        return hashlib.sha256(np.ascontiguousarray(self._lengths, dtype=np.int64).tobytes()).hexdigest()[:16]

    def global_batches(self) -> IndexBatches:
        """Compute the global batches of the current epoch, as arrays of row indices."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = self._epoch_rows(random)
        num_rest = self.num_rows % self.global_batch_size
        order, rest = order[: self.num_rows - num_rest], order[self.num_rows - num_rest :]
        if self._lengths is not None:
            order = _sort_groups(order, self._lengths, group_size=_BATCHES_SORTED_TOGETHER * self.global_batch_size)
        batches_BN = order.reshape(-1, self.global_batch_size)
        if self.shuffle:
            batches_BN = batches_BN[random.permutation(len(batches_BN))]
        if not len(rest) or self.drop_last:
            return IndexBatches(batches_BN)
        if self._has_own_batch(len(rest)):
            return IndexBatches(batches_BN, rest)
        return IndexBatches(batches_BN[:-1], np.concatenate([batches_BN[-1], rest]))

    def _epoch_rows(self, random: np.random.Generator) -> Indices:
        """Draw the rows of the current epoch, in the order in which they are grouped."""
        return random.permutation(self.num_rows) if self.shuffle else np.arange(self.num_rows)

    def _has_own_batch(self, num_rest: int) -> bool:
        return num_rest >= self.num_replicas


def _sort_groups(rows: Indices, lengths: np.ndarray[Any, Any], *, group_size: int) -> Indices:
    """Sort the rows of each group by length, the longest first. Rows of equal length keep their order."""
    longest = int(lengths.max(initial=0))
    bits = group_size.bit_length()
    keys = (longest - lengths[rows]).astype(np.int64)
    if int(keys.max(initial=0)).bit_length() + bits > 63:
        raise ValueError(f"`lengths` must be below {1 << (63 - bits)}, but one is {longest}.")
    # Length and position in one number: these differ, so that any sort keeps the order of equal lengths, the fastest too.
    keys <<= bits
    num_whole = len(rows) // group_size * group_size
    result = np.empty_like(rows)
    for start, stop, width in ((0, num_whole, group_size), (num_whole, len(rows), len(rows) - num_whole)):
        if start < stop:
            keys_GN = keys[start:stop].reshape(-1, width)
            keys_GN += np.arange(width)
            keys_GN.sort(axis=1)
            keys_GN &= (1 << bits) - 1
            keys_GN += np.arange(start, stop, width)[:, None]
            result[start:stop] = rows[keys_GN.reshape(-1)]
    return result


class RepeatedSampler(LengthGroupedSampler, SequentialSampler):
    """A sampler that yields the numbers of another sampler's batches, the same in each epoch.

    With ``overfit_batches``, the Trainer takes the first batches of each epoch. It leaves a `SequentialSampler` in its place.

    Args:
        sampler: The sampler. The batches of its first epoch are repeated.
    """

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        for name in ("seed", "global_batch_size", "num_rows", "num_replicas", "rank"):
            setattr(self, name, getattr(sampler, name))
        self.epoch = self.start = 0
        self._of = sampler.order
        self._batches: Sequence[Any] = sampler.rank_batches()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # numbers of batches instead of batches
        return iter(range(self.start, len(self)))

    def __getitem__(self, number: int) -> Any:
        """Return the row indices of a batch."""
        return self._batches[number]

    @property
    def order(self) -> str:  # of the other sampler
        """The order of the other sampler, as one that is repeated."""
        return f"repeated-{self._of}"


class ResumableLoader(DataLoader[Any]):
    """A data loader that can resume in the middle of an epoch, after the last batch that it yielded.

    The state counts the batches that the loader has yielded, not those that its workers have prefetched. It is the same
    on every rank. The count returns to 0 before the last batch is yielded, so a checkpoint saved on that batch starts the
    next epoch. The Trainer saves and restores the state.

    The loader needs a `LengthGroupedSampler` as ``sampler``, and ``batch_size=None``.
    """

    _num_yielded = 0
    _resume: tuple[int, int] | None = None

    def __init__(self, dataset: Any, sampler: Any = None, **options: Any) -> None:
        # With `overfit_batches` and several loaders, the Trainer puts a plain sampler in the place of a repeated one.
        kept = sampler if isinstance(sampler, LengthGroupedSampler) else dataset.batches
        super().__init__(dataset, sampler=kept, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # its own iterator type has nothing that callers use
        # This is a generator, so all of it runs at the first batch. The Trainer creates an iterator once before it sets
        # the epoch.
        sampler = cast(LengthGroupedSampler, self.sampler)
        epoch, start = self._resume or (sampler.epoch, 0)
        self._resume = None
        # A run that uses only a part of each epoch is saved in one epoch and resumes with the next.
        start = start if epoch == sampler.epoch else 0
        self._num_yielded = start
        sampler.start = start
        batches = super().__iter__()
        # The sampler cannot reset this itself: with workers, one iterator of the loader creates two of the sampler.
        sampler.start = 0
        for batch in batches:
            self._num_yielded = (self._num_yielded + 1) % len(self)
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """Return the epoch, the number of batches yielded in it, and the settings that the batches depend on."""
        sampler = cast(LengthGroupedSampler, self.sampler)
        return {
            "num_yielded": self._num_yielded if self._resume is None else self._resume[1],
            "epoch": sampler.epoch if self._resume is None else self._resume[0],
            "seed": sampler.seed,
            "global_batch_size": sampler.global_batch_size,
            "num_rows": sampler.num_rows,
            "order": sampler.order,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration start after the batches that ``state`` counts.

        Raises:
            ValueError: If the state is from the middle of an epoch with another number of rows, global batch size, seed or
                order, or of another loader.
        """
        own = self.state_dict()
        if absent := [name for name in own if name not in state and name != "order"]:
            raise ValueError(f"the state of the data loader in the checkpoint has no {absent[0]}, so it is of another loader.")
        changed = [name for name in ("seed", "global_batch_size", "num_rows") if own[name] != state[name]]
        if changed and state["num_yielded"]:
            raise ValueError(
                "cannot resume in the middle of an epoch, because "
                + ", ".join(f"{name} is {own[name]} but {state[name]} in the checkpoint" for name in changed)
                + ". Resume with the same data, packing, seed and batch size times processes, or from a checkpoint at the end "
                "of an epoch."
            )
        # States of earlier releases have no order.
        if state.get("order", own["order"]) != own["order"] and state["num_yielded"]:
            raise ValueError(
                "cannot resume in the middle of an epoch, because its rows are in another order than in the run of the "
                "checkpoint. Some rows would be repeated and others skipped. Resume with the same group_by_length, max_length, "
                "packing, truncation, tokenizer and file, or from a checkpoint at the end of an epoch."
            )
        # A run that was saved after all batches of an epoch, but before its end, gets no more batches in it.
        self._resume = (state["epoch"], len(self) if state.get("ended") else state["num_yielded"])
        cast(LengthGroupedSampler, self.sampler).set_epoch(state["epoch"])
