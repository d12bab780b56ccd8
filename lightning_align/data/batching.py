"""Batches: which rows go together, how they are padded, and a loader that knows where it was.

A global batch is what all ranks see in one step. It depends on the seed, the epoch and its size only, and each rank
takes its part of it, so one process with batches of 8 and two with batches of 4 train on the same rows in the same
steps.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_align.data.store import StoredRow, StoredTokens, TokenStore
from lightning_align.types import PreferenceBatch, PromptBatch, TokenBatch

_BATCHES_SORTED_TOGETHER = 64


def collate_tokens(rows: Sequence[StoredRow], *, pad_id: int) -> TokenBatch:
    """Pads rows on the right: (B, N) with N the longest. Reads the first side of each."""
    return _pad([row.sides[0] for row in rows], rows, pad_id=pad_id)


def collate_pairs(rows: Sequence[StoredRow], *, pad_id: int) -> PreferenceBatch:
    """Pads pairs on the right, each side to its own longest row. Weights and margins are there if any is not the usual one."""
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
    """Prompts as lists of ids, without their answers."""
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
        # From the lengths: a pad may have the id of a real token.
        "mask": torch.arange(width) < lengths[:, None],
        "targets": torch.from_numpy(targets),
        "num_bytes": torch.tensor([side.num_bytes for side in sides]),
        "rows": torch.tensor([row.row for row in rows]),
    }


class RowLists(Dataset[list[StoredRow]]):
    """The rows of a store by lists of indices, which is what the samplers here yield.

    Args:
        store: The rows.
        batches: Lists of indices that a plain sampler may ask for by their number; None where the sampler yields the lists.
    """

    def __init__(self, store: TokenStore, batches: list[list[int]] | None = None) -> None:
        self.store = store
        self.batches = batches

    def __len__(self) -> int:
        return len(self.store) if self.batches is None else len(self.batches)

    def __getitem__(self, index: Sequence[int] | int) -> list[StoredRow]:
        if isinstance(index, int):
            assert self.batches is not None
            index = self.batches[index]
        return [self.store[row] for row in index]


class LengthGroupedSampler(DistributedSampler[list[int]]):
    """Yields each rank's batches, as lists of indices, of rows of about one length.

    Every row comes once an epoch, and every rank has the same number of batches. An epoch is cut in stretches of 64
    global batches; each stretch is sorted by length and cut in batches, and then all batches are shuffled. The last
    global batch may be smaller, and its parts may differ by one row from rank to rank. Where it has fewer rows than
    there are ranks, and so some rank would have none, its rows join the batch before it; this is the one case in which
    the global batches depend on the number of ranks.

    A `DistributedSampler`, so that the Trainer leaves it in its place and tells it the epoch.

    Args:
        lengths: (rows,) length of each row; None keeps rows of any length together.
        num_rows: Number of rows.
        batch_size: Rows of one batch of one rank.
        num_replicas: Number of ranks.
        rank: Which of them this is.
        shuffle: Whether each epoch has its own order. Without it the stretches and batches keep theirs.
        seed: Where the orders start from.
        drop_last: Whether to leave the rows that fill no global batch out, others every epoch.

    Raises:
        ValueError: If a number is out of range or there are too few rows for every rank to have one.
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
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
        self.global_batch_size = batch_size * num_replicas
        if num_rows < (self.global_batch_size if drop_last else num_replicas):
            raise ValueError(
                f"there are {num_rows} rows, too few for batch_size {batch_size} on {num_replicas} processes: use fewer"
                " processes or smaller batches"
            )
        rows = cast(Dataset[list[int]], range(num_rows))
        super().__init__(rows, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.num_rows = num_rows
        self.start = 0
        """Batches at the beginning of an epoch that iterations leave out; a resumed loader sets it for one iteration."""
        self._lengths = lengths

    def __len__(self) -> int:
        num_whole, num_rest = divmod(self.num_rows, self.global_batch_size)
        return num_whole + int(not self.drop_last and self._has_own_batch(num_rest))

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.global_batches()[self.start :]
        # Strided, so that each rank has a share of the longer and of the shorter rows of a batch.
        return iter([batch[self.rank :: self.num_replicas].tolist() for batch in batches])

    @cached_property
    def order(self) -> str:
        """What orders an epoch beside the numbers: a digest of the lengths, or that there are none."""
        if self._lengths is None:
            return "ungrouped"
        return hashlib.sha256(np.ascontiguousarray(self._lengths, dtype=np.int64).tobytes()).hexdigest()[:16]

    def global_batches(self) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """The batches of this epoch that all ranks see together, as arrays of indices."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self.num_rows) if self.shuffle else np.arange(self.num_rows)
        num_rest = self.num_rows % self.global_batch_size
        order, rest = order[: self.num_rows - num_rest], order[self.num_rows - num_rest :]
        stretch = _BATCHES_SORTED_TOGETHER * self.global_batch_size
        batches = []
        for start in range(0, len(order), stretch):
            indices = order[start : start + stretch]
            if self._lengths is not None:
                indices = indices[np.argsort(-self._lengths[indices], kind="stable")]
            batches += list(indices.reshape(-1, self.global_batch_size))
        if self.shuffle:
            batches = [batches[i] for i in random.permutation(len(batches))]
        if len(rest) and not self.drop_last:
            if self._has_own_batch(len(rest)):
                batches.append(rest)
            else:
                batches[-1] = np.concatenate([batches[-1], rest])
        return batches

    def _has_own_batch(self, num_rest: int) -> bool:
        return num_rest >= self.num_replicas


class ResumableLoader(DataLoader[Any]):
    """A loader that continues in the middle of an epoch, after the batch that was last handed out.

    Its state is a count of the batches it has yielded, not of those that its workers have fetched ahead, and is the
    same on every rank. It goes back to 0 before the last batch is handed out: a checkpoint taken on that batch begins
    the next epoch. The trainer saves and restores it. Made with a `LengthGroupedSampler` as ``sampler`` and
    ``batch_size=None``.
    """

    _num_yielded = 0
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # its own iterator type has nothing that callers use
        # All of this runs at the first batch and not before: the trainer makes an iterator once before it sets the
        # epoch.
        sampler = cast(LengthGroupedSampler, self.sampler)
        epoch, start = self._resume or (sampler.epoch, 0)
        self._resume = None
        # A run that was limited to a part of each epoch leaves off in one epoch and goes on with the next.
        start = start if epoch == sampler.epoch else 0
        self._num_yielded = start
        sampler.start = start
        batches = super().__iter__()
        # Not by the sampler itself: with workers, making one iterator of the loader makes two of the sampler.
        sampler.start = 0
        for batch in batches:
            self._num_yielded = (self._num_yielded + 1) % len(self)
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """The epoch, the number of batches of it that were yielded, and what they depend on."""
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
        """Makes the next iteration begin after the batches that ``state`` counts.

        Raises:
            ValueError: If those were batches of other rows, another size, another seed or another order.
        """
        own = self.state_dict()
        changed = [name for name in ("seed", "global_batch_size", "num_rows") if own[name] != state[name]]
        if changed and state["num_yielded"]:
            raise ValueError(
                "cannot resume in the middle of an epoch: "
                + ", ".join(f"{name} is {own[name]}, the checkpoint has {state[name]}" for name in changed)
                + "; resume with the same data, seed and batch size times processes, or from a checkpoint of an epoch's end"
            )
        # A state of before the order was in it says nothing of it.
        if state.get("order", own["order"]) != own["order"] and state["num_yielded"]:
            raise ValueError(
                "cannot resume in the middle of an epoch: its rows come in another order than in the checkpoint's run, so "
                "some would come twice and others not at all; resume with the same group_by_length, max_length, truncation, "
                "tokenizer and file, or from a checkpoint of an epoch's end"
            )
        self._resume = (state["epoch"], state["num_yielded"])
        cast(LengthGroupedSampler, self.sampler).set_epoch(state["epoch"])
