"""Batches by a number of tokens: no batch exceeds it, no row is lost, and ranks and resumed runs agree."""

from typing import Any

import numpy as np
import pytest

from lightning_align.data.batching import ResumableLoader
from lightning_align.data.token_batches import STEPS, TokenBatchSampler

LENGTHS = np.random.default_rng(1).integers(3, 60, 203)
BUDGET = 150


def sampler(lengths: Any = LENGTHS, **options: Any) -> TokenBatchSampler:
    return TokenBatchSampler(lengths, **{"budget": BUDGET, "grouped": True, **options})


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_every_row_occurs_once_and_no_batch_exceeds_the_budget(grouped: bool, num_replicas: int) -> None:
    ranks = [sampler(grouped=grouped, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    for epoch in range(3):
        for each in ranks:
            each.set_epoch(epoch)
        parts = [list(each) for each in ranks]
        assert {len(part) for part in parts} == {len(ranks[0])}  # of every rank and epoch
        batches = [batch for part in parts for batch in part]
        assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
        assert max(int(LENGTHS[batch].sum()) for batch in batches) <= BUDGET
        assert min(map(len, batches)) >= 1


def test_batches_are_full_and_have_rows_of_similar_length() -> None:
    batches = list(sampler())
    assert np.mean([LENGTHS[batch].sum() for batch in batches]) >= 0.8 * BUDGET
    assert np.mean([np.ptp(LENGTHS[batch]) for batch in batches]) <= 4
    mixed = list(sampler(grouped=False))
    assert np.mean([LENGTHS[batch].sum() for batch in mixed]) >= 0.95 * BUDGET
    assert np.mean([np.ptp(LENGTHS[batch]) for batch in mixed]) >= 15


def test_long_rows_are_mixed_with_those_of_nearly_their_length() -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(1000, 2000))  # all differ
    each = sampler(lengths, budget=8000)
    partners = []
    for epoch in range(2):
        each.set_epoch(epoch)
        partners.append({frozenset(batch) for batch in each})
    assert len(partners[0] & partners[1]) <= 0.1 * len(partners[0])
    assert len(set(each.row_lengths.tolist())) <= STEPS + 1
    assert (each.row_lengths >= lengths).all()


def test_epochs_and_seeds_differ_and_repeat() -> None:
    each = sampler()
    first = list(each)
    each.set_epoch(1)
    assert list(each) != first
    each.set_epoch(0)
    assert list(each) == first
    assert list(sampler(seed=1)) != first


def test_few_rows_leave_no_rank_without_one() -> None:
    """Three rows that do not fit together, on two ranks: the last step has all of them."""
    ranks = [sampler(np.array([9, 8, 7]), budget=10, num_replicas=2, rank=rank) for rank in range(2)]
    parts = [list(each) for each in ranks]
    assert [len(part) for part in parts] == [1, 1]
    assert sorted(row for part in parts for batch in part for row in batch) == [0, 1, 2]


def test_impossible_budgets_are_errors() -> None:
    with pytest.raises(ValueError, match=r"`batch_tokens` must be at least the tokens of the longest row.*59, but got 40"):
        sampler(budget=40)
    with pytest.raises(ValueError, match="`num_rows` is 1, which is too few for 2 processes"):
        sampler(np.array([5]), num_replicas=2)


class Rows:
    """Each row is its own number."""

    def __getitem__(self, rows: Any) -> Any:
        return rows

    def __len__(self) -> int:
        return len(LENGTHS)


@pytest.mark.parametrize("grouped", [True, False])
def test_a_resumed_loader_goes_on_with_the_next_batch(grouped: bool) -> None:
    def loader(**options: Any) -> ResumableLoader:
        rows: Any = Rows()
        return ResumableLoader(rows, sampler=sampler(grouped=grouped, **options), batch_size=None, collate_fn=list)

    whole: list[Any] = []
    state: dict[str, Any] = {}
    for number, batch in enumerate(source := loader()):
        whole.append(batch)
        state = source.state_dict() if number == 2 else state
    resumed = loader()
    resumed.load_state_dict(state)
    assert list(resumed) == whole[3:]
    for other in ({"budget": BUDGET + 1}, {"seed": 1}):
        with pytest.raises(ValueError, match="cannot resume in the middle of an epoch"):
            loader(**other).load_state_dict(state)
