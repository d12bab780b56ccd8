from functools import partial

import numpy as np
import pytest
import torch

from lightning_align.data.batching import (
    LengthGroupedSampler,
    ResumableLoader,
    RowLists,
    collate_pairs,
    collate_prompts,
    collate_tokens,
)
from lightning_align.data.store import Recipe, StoredRow, StoredTokens, build_store
from lightning_align.data.tokenizer import ByteTokenizer
from tests.data.helpers import write_jsonl


def _row(index, *lengths, num_prompt=1):
    sides = [StoredTokens(np.arange(1, n + 1, dtype=np.int32), np.arange(n) >= num_prompt, n - num_prompt) for n in lengths]
    return StoredRow(index, num_prompt, sides)


def test_padding_by_hand():
    batch = collate_tokens([_row(4, 3), _row(7, 2)], pad_id=1)
    assert batch["tokens"].tolist() == [[1, 2, 3], [1, 2, 1]]
    assert batch["mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["targets"].tolist() == [[False, True, True], [False, True, False]]
    assert batch["num_bytes"].tolist() == [2, 1]
    assert batch["rows"].tolist() == [4, 7]
    assert (batch["tokens"].dtype, batch["mask"].dtype, batch["rows"].dtype) == (torch.int64, torch.bool, torch.int64)


def test_pairs_and_prompts():
    rows = [_row(0, 3, 5), _row(1, 2, 4)]
    batch = collate_pairs(rows, pad_id=0)
    assert batch["chosen"]["tokens"].shape == (2, 3)
    assert batch["rejected"]["tokens"].shape == (2, 5)
    prompts = collate_prompts(rows)
    assert prompts["prompts"] == [[1], [1]]
    assert prompts["rows"].tolist() == [0, 1]


def _sampler(num_rows=203, batch_size=8, num_replicas=1, rank=0, **options):
    lengths = np.random.default_rng(1).integers(3, 400, num_rows)
    return LengthGroupedSampler(
        lengths, num_rows=num_rows, batch_size=batch_size, num_replicas=num_replicas, rank=rank, **options
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("batch_size", "num_replicas"), [(8, 1), (4, 2), (2, 4), (1, 8), (101, 2), (300, 1), (100, 3)])
def test_every_row_occurs_once_and_every_rank_has_rows(batch_size, num_replicas, shuffle):
    samplers = [
        _sampler(batch_size=batch_size, num_replicas=num_replicas, rank=rank, shuffle=shuffle) for rank in range(num_replicas)
    ]
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {len(sampler) for sampler in samplers} == {len(samplers[0])}
    assert all(batch for part in parts for batch in part)
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(203))


def test_global_batches_do_not_depend_on_the_number_of_processes():
    for epoch in (0, 1):
        seen = []
        for batch_size, num_replicas in ((8, 1), (4, 2), (2, 4)):
            samplers = [_sampler(202, batch_size, num_replicas, rank) for rank in range(num_replicas)]
            for sampler in samplers:
                sampler.set_epoch(epoch)
            steps = zip(*samplers, strict=True)
            seen.append([sorted(index for part in step for index in part) for step in steps])
        # With four ranks, the last two rows are added to the batch before. With one or two ranks, they are a batch.
        assert seen[0] == seen[1]
        assert seen[2][:-1] == seen[0][:-2]
        assert seen[2][-1] == sorted(seen[0][-2] + seen[0][-1])


def test_the_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = _sampler(seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 1) != order(1, 0)


def slow_order(lengths, batch_size, seed, epoch):
    """The order of an epoch, batch by batch. Checkpoints of earlier releases rely on it."""
    numbers = np.random.default_rng([seed, epoch])
    rows = numbers.permutation(len(lengths)).tolist()
    num_whole = len(rows) // batch_size * batch_size
    batches = []
    for start in range(0, num_whole, 64 * batch_size):
        group = sorted(rows[start : min(start + 64 * batch_size, num_whole)], key=lambda row: -lengths[row])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    batches = [batches[i] for i in numbers.permutation(len(batches))]
    return batches + ([rows[num_whole:]] if num_whole < len(rows) else [])


@pytest.mark.parametrize("num_rows", [5, 192, 1000, 1537])
def test_the_order_is_that_of_a_slow_version(num_rows):
    lengths = np.random.default_rng(1).integers(1, 30, num_rows)  # many are equal
    sampler = LengthGroupedSampler(lengths, num_rows=num_rows, batch_size=3, seed=4)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        batches = slow_order(lengths.tolist(), 3, 4, epoch)
        assert list(sampler) == batches
        assert len(sampler) == len(batches)
        found = sampler.global_batches()
        assert [batch.tolist() for batch in found] == batches
        assert [batch.tolist() for batch in found[2:]] == batches[2:]
        assert found[-1].tolist() == batches[-1]
    assert isinstance(found.whole_BN, np.ndarray)


def test_lengths_that_leave_no_room_for_positions_are_refused():
    lengths = np.array([1, 2**60, 3])
    with pytest.raises(ValueError, match="`lengths` must be below"):
        list(LengthGroupedSampler(lengths, num_rows=3, batch_size=1))


def test_grouping_reduces_padding():
    lengths = np.random.default_rng(0).integers(3, 400, 2000)

    def cells(sampler):
        return sum(int(lengths[batch].max()) * len(batch) for batch in sampler)

    grouped = cells(LengthGroupedSampler(lengths, num_rows=2000, batch_size=8))
    mixed = cells(LengthGroupedSampler(None, num_rows=2000, batch_size=8))
    assert grouped < 1.02 * lengths.sum() < 1.5 * lengths.sum() < mixed


def test_the_last_rows_are_dropped_only_with_drop_last():
    sampler = _sampler(203, drop_last=True)
    assert [len(batch) for batch in sampler] == [8] * 25
    assert len(sampler) == 25
    assert [len(batch) for batch in _sampler(203)] == [8] * 25 + [3]


def test_without_lengths_and_shuffling_the_order_is_that_of_the_source():
    sampler = LengthGroupedSampler(None, num_rows=7, batch_size=3, shuffle=False)
    assert list(sampler) == [[0, 1, 2], [3, 4, 5], [6]]


def test_too_few_rows():
    with pytest.raises(ValueError, match="`num_rows` is 2, which is too few"):
        _sampler(2, num_replicas=3)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, but got 0"):
        _sampler(batch_size=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    source = write_jsonl(folder / "rows.jsonl", [{"prompt": "p" * (i % 9), "response": str(i)} for i in range(43)])
    recipe = Recipe(
        kind="sft",
        accepted=("response",),
        max_length=64,
        truncation="drop",
        mask_turns="last_turn",
        on_bad_row="fail",
    )
    path = folder / "rows.arrow"
    return build_store(path, source=source, split="train", recipe=recipe, tokenizer=ByteTokenizer())[0]


def _loader(store, *, num_workers=0, batch_size=8, seed=0):
    sampler = LengthGroupedSampler(store.lengths(), num_rows=len(store), batch_size=batch_size, seed=seed)
    return ResumableLoader(
        RowLists(store),
        sampler=sampler,
        batch_size=None,
        collate_fn=partial(collate_tokens, pad_id=0),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def _epochs(loader, epochs, *, stop=None):
    """Return the rows of each batch and the state after each batch, up to ``stop`` batches."""
    seen, states = [], []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            seen.append(batch["rows"].tolist())
            states.append(loader.state_dict())
            if len(seen) == stop:
                return seen, states
    return seen, states


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_after_any_batch_equals_the_uninterrupted_run(store, num_workers):
    whole, states = _epochs(_loader(store, num_workers=num_workers), [0, 1])
    assert len(whole) == 12
    for taken in (1, 3, 5, 6, 7) if num_workers == 0 else (3, 6):
        _, stopped = _epochs(_loader(store, num_workers=num_workers), [0, 1], stop=taken)
        assert stopped[-1] == states[taken - 1]
        loader = _loader(store, num_workers=num_workers)
        loader.load_state_dict(stopped[-1])
        assert loader.state_dict() == stopped[-1]
        assert len(loader) == 6
        # The trainer resumes in the interrupted epoch, or in the next epoch if it was complete.
        rest, _ = _epochs(loader, [0, 1] if taken < 6 else [1])
        assert rest == whole[taken:]


def test_the_state_wraps_on_the_last_batch(store):
    _, states = _epochs(_loader(store), [0])
    assert [state["num_yielded"] for state in states] == [1, 2, 3, 4, 5, 0]


def test_an_interrupted_epoch_does_not_shorten_the_next(store):
    loader = _loader(store)
    _epochs(loader, [0], stop=3)
    assert len(_epochs(loader, [1])[0]) == 6
    other = _loader(store)
    _, states = _epochs(loader, [0], stop=3)
    other.load_state_dict(states[-1])
    assert len(_epochs(other, [1])[0]) == 6


def test_a_state_of_other_batches_is_an_error(store):
    _, states = _epochs(_loader(store), [0], stop=2)
    with pytest.raises(ValueError, match="global_batch_size is 4 but 8 in the checkpoint"):
        _loader(store, batch_size=4).load_state_dict(states[-1])
    with pytest.raises(ValueError, match="seed is 1 but 0 in the checkpoint"):
        _loader(store, seed=1).load_state_dict(states[-1])
    _loader(store, seed=1).load_state_dict({**states[-1], "num_yielded": 0})


@pytest.mark.parametrize("grouped", [True, False])
def test_a_state_of_another_order_is_an_error(store, grouped):
    """Rows of other lengths, as with another `max_length`, are in another order. So are rows that are not sorted by length."""

    def start(lengths):
        sampler = LengthGroupedSampler(lengths, num_rows=len(store), batch_size=8)
        return ResumableLoader(RowLists(store), sampler=sampler, batch_size=None, collate_fn=partial(collate_tokens, pad_id=0))

    own, other = (store.lengths(), store.lengths().clip(max=5)) if grouped else (None, store.lengths())
    _, states = _epochs(start(own), [0], stop=2)
    with pytest.raises(ValueError, match=r"another order .* Resume with the same group_by_length, max_length"):
        start(other).load_state_dict(states[-1])
    start(own).load_state_dict(states[-1])
    # A state from the end of an epoch and a state without an order are accepted.
    start(other).load_state_dict({**states[-1], "num_yielded": 0})
    start(other).load_state_dict({name: value for name, value in states[-1].items() if name != "order"})
