"""Packing of rows: every row once, no sequence too long, the same for any number of ranks, and batches worked by hand."""

from functools import partial

import numpy as np
import pytest

from lightning_align.data.batching import ResumableLoader, RowLists
from lightning_align.data.row_packing import PackedSampler, Sequences, collate_packed, pack_lengths
from lightning_align.data.store import StoredRow, StoredTokens


def _row(index, length, num_prompt=1):
    side = StoredTokens(np.arange(1, length + 1, dtype=np.int32), np.arange(length) >= num_prompt, length - num_prompt)
    return StoredRow(index, num_prompt, [side])


def _slow_best_fit(lengths, capacity):
    """Best-fit decreasing, one row at a time. Returns the used tokens of each sequence."""
    used = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, tokens in enumerate(used) if tokens + length <= capacity]
        if fitting:
            used[max(fitting, key=lambda i: used[i])] += length
        else:
            used.append(length)
    return used


def test_packing_by_hand():
    """Rows of 2, 5, 3, 4 and 1 tokens: 5 fills a sequence, then 4 and 1, then 3 and 2."""
    lengths = np.array([2, 5, 3, 4, 1])
    plan = pack_lengths(lengths, 5)
    totals = [np.sort(lengths)[plan.places[a:b]].tolist() for a, b in zip(plan.starts, plan.starts[1:], strict=False)]
    assert totals == [[5], [4, 1], [3, 2]]


def test_packing_equals_best_fit_one_row_at_a_time():
    random = np.random.default_rng(0)
    for _ in range(100):
        capacity = int(random.integers(1, 60))
        lengths = random.integers(1, capacity + 1, int(random.integers(1, 120)))
        plan = pack_lengths(lengths, capacity)
        assert sorted(plan.places) == list(range(len(lengths)))
        used = np.add.reduceat(np.sort(lengths)[plan.places], plan.starts[:-1])
        assert sorted(used) == sorted(_slow_best_fit(lengths.tolist(), capacity))


def test_a_row_longer_than_a_sequence_is_an_error():
    with pytest.raises(ValueError, match="`capacity` must be at least the length of the longest row, 9, but got 8"):
        pack_lengths(np.array([3, 9]), 8)


LENGTHS = np.random.default_rng(1).integers(3, 60, 203)


def _sampler(lengths=LENGTHS, *, capacity=64, batch_size=4, **options):
    return PackedSampler(lengths, capacity=capacity, batch_size=batch_size, **options)


@pytest.mark.parametrize(("batch_size", "num_replicas"), [(8, 1), (4, 2), (2, 4), (1, 8), (500, 1), (33, 3)])
def test_every_row_occurs_once_per_epoch_on_any_number_of_ranks(batch_size, num_replicas):
    samplers = [_sampler(batch_size=batch_size, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(sampler) for sampler in samplers}
        assert all(batch for part in parts for batch in part)
        sequences = [sequence for part in parts for batch in part for sequence in batch]
        assert sorted(np.concatenate(sequences)) == list(range(203))
        assert max(LENGTHS[sequence].sum() for sequence in sequences) <= 64


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    def batches(num_replicas):
        options = {"capacity": 66, "batch_size": 8 // num_replicas, "num_replicas": num_replicas}
        parts = [list(_sampler(**options, rank=rank)) for rank in range(num_replicas)]
        return [sorted(tuple(s) for batch in step for s in batch) for step in zip(*parts, strict=True)]

    assert batches(1) == batches(2) == batches(4)


def test_epochs_and_seeds_differ_and_repeat():
    sampler = _sampler()
    first = [tuple(s) for batch in sampler for s in batch]
    sampler.set_epoch(1)
    second = [tuple(s) for batch in sampler for s in batch]
    # Rows of one length change places, so the sequences hold other rows.
    assert {frozenset(s) for s in first} != {frozenset(s) for s in second}
    sampler.set_epoch(0)
    assert [tuple(s) for batch in sampler for s in batch] == first
    assert [tuple(s) for batch in _sampler(seed=1) for s in batch] != first


def test_few_sequences_are_split_so_that_every_rank_has_one():
    samplers = [_sampler(np.full(5, 3), num_replicas=4, rank=rank) for rank in range(4)]
    parts = [list(sampler) for sampler in samplers]
    assert sorted(row for part in parts for batch in part for s in batch for row in s) == list(range(5))
    assert all(len(part) == 1 and len(part[0]) == 1 for part in parts)


def test_collating_by_hand():
    batch = collate_packed([[_row(4, 3), _row(7, 2)], [_row(9, 2)]], pad_id=8)
    assert batch["tokens"].tolist() == [[1, 2, 3, 1, 2], [1, 2, 8, 8, 8]]
    assert batch["mask"].tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch["targets"].tolist() == [[False, True, True, False, True], [False, True, False, False, False]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1], [2, 2, -1, -1, -1]]
    assert batch["rows"].tolist() == [4, 7, 9]
    assert batch["num_bytes"].tolist() == [2, 1, 1]


class _Rows:
    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        return _row(index, int(LENGTHS[index]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_next_batch(num_workers):
    def loader(capacity=64):
        return ResumableLoader(
            RowLists(Sequences(_Rows())),
            sampler=_sampler(capacity=capacity),
            batch_size=None,
            collate_fn=partial(collate_packed, pad_id=0),
            num_workers=num_workers,
        )

    whole, state = [], None
    for number, batch in enumerate(source := loader()):
        whole.append(batch["rows"].tolist())
        state = source.state_dict() if number == 2 else state
    resumed = loader()
    resumed.load_state_dict(state)
    assert [batch["rows"].tolist() for batch in resumed] == whole[3:]
    with pytest.raises(ValueError, match="cannot resume in the middle of an epoch"):
        loader(capacity=65).load_state_dict(state)
