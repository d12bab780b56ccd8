import pickle
from collections import Counter

import numpy as np
import pytest

from lightning_align.data.batching import ResumableLoader, RowLists
from lightning_align.data.mixture import MixedStore, MixtureSampler, describe, mixture_quotas, parts_of
from lightning_align.data.store import Recipe, build_store, store_path
from lightning_align.data.tokenizer import ByteTokenizer
from tests.data.helpers import write_jsonl

TOKENIZER = ByteTokenizer()


def _store(tmp_path, name, rows, **changes):
    settings = {
        "kind": "sft",
        "accepted": ("response", "pair"),
        "max_length": 64,
        "truncation": "keep_start",
        "mask_turns": "last_turn",
        "on_bad_row": "skip",
    }
    recipe = Recipe(**(settings | changes))
    source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    path = store_path(source, split="train", recipe=recipe, tokenizer=TOKENIZER, cache_dir=str(tmp_path / "cache"))
    return build_store(path, source=source, split="train", recipe=recipe, tokenizer=TOKENIZER)[0]


def _rows(letter, count):
    return [{"prompt": letter * (i + 1), "response": "r"} for i in range(count)]


def _sampler(sizes=(6, 20), weights=(1, 2), stop="first_exhausted", batch_size=4, lengths=None, **settings):
    return MixtureSampler(lengths, sizes=sizes, weights=weights, stop=stop, batch_size=batch_size, **settings)


def _epoch(sampler, epoch):
    sampler.set_epoch(epoch)
    return [row for batch in sampler.global_batches() for row in batch.tolist()]


@pytest.mark.parametrize(
    ("sizes", "weights", "first", "all_of_them"),
    [
        ([6, 20], [1, 2], [6, 12], [10, 20]),
        ([10, 10], [0.5, 0.5], [10, 10], [10, 10]),
        ([3, 3, 3], [0.1, 0.2, 0.7], [1, 1, 3], [3, 6, 21]),
        ([1000, 7], [1, 1e-6], [1000, 1], [7_000_000, 7]),
    ],
)
def test_quotas(sizes, weights, first, all_of_them):
    assert mixture_quotas(sizes, weights, "first_exhausted") == first
    assert mixture_quotas(sizes, weights, "all_exhausted") == all_of_them


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
def test_every_row_is_drawn_before_one_is_drawn_again(stop):
    sampler = _sampler(stop=stop)
    drawn = Counter()
    for epoch in range(10):
        rows = _epoch(sampler, epoch)
        assert [sum(row < 6 for row in rows), sum(row >= 6 for row in rows)] == sampler.quotas
        drawn.update(rows)
        for part in (range(6), range(6, 26)):
            counts = [drawn[row] for row in part]
            assert max(counts) - min(counts) <= 1


def test_the_order_depends_on_seed_and_epoch_alone():
    sampler, same, other = _sampler(), _sampler(), _sampler(seed=1)
    assert _epoch(sampler, 3) == _epoch(same, 3) != _epoch(sampler, 4)
    assert _epoch(sampler, 0) != _epoch(other, 0)
    assert sorted(_epoch(sampler, 0)) != _epoch(sampler, 0)
    # Two parts of one size do not draw the same rows.
    rows = _epoch(_sampler(sizes=(50, 50), weights=(1, 1)), 0)
    assert [row for row in rows if row < 50] != [row - 50 for row in rows if row >= 50]


def test_two_ranks_draw_what_one_draws():
    lengths = np.arange(26) % 7
    alone = _sampler(lengths=lengths, batch_size=4)
    ranks = [_sampler(lengths=lengths, batch_size=2, num_replicas=2, rank=rank) for rank in range(2)]
    parts = [list(rank) for rank in ranks]
    assert [sorted(batch.tolist()) for batch in alone.global_batches()] == [sorted(a + b) for a, b in zip(*parts, strict=True)]
    assert len(alone) == len(ranks[0]) == 5


def test_rows_of_a_mixed_store(tmp_path):
    bad = [{"prompt": "x", "response": ""}]
    one, two = _store(tmp_path, "one", [*_rows("a", 3), *bad, *_rows("b", 1)]), _store(tmp_path, "two", [*bad, *_rows("c", 4)])
    mixed = MixedStore([one, two], ["one", "two"])
    assert len(mixed) == 8 and mixed.sizes == [4, 4] and mixed.num_sides == 1
    assert [mixed[i].row for i in range(8)] == [0, 1, 2, 4, 6, 7, 8, 9]
    assert mixed.starts[:2] == [0, 5]
    for i in range(8):
        store, index = (one, i) if i < 4 else (two, i - 4)
        assert mixed[i].sides[0].tokens.tolist() == store[index].sides[0].tokens.tolist()
    assert mixed.lengths().tolist() == [*one.lengths(), *two.lengths()]
    again = pickle.loads(pickle.dumps(mixed))
    assert again[7].row == 9 and len(pickle.dumps(mixed)) < 2000
    other = MixedStore([one, _store(tmp_path, "three", _rows("c", 5))], ["one", "three"])
    assert len({mixed.path, other.path, one.path, MixedStore([two, one], ["two", "one"]).path}) == 4


def test_pairs_and_responses_do_not_mix(tmp_path):
    pairs = _store(tmp_path, "pairs", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="one has no pairs, pairs has pairs"):
        MixedStore([_store(tmp_path, "one", _rows("a", 1)), pairs], ["one", "pairs"])


def test_a_mixture_with_other_weights_is_not_resumed_in_an_epoch(tmp_path):
    stores = [_store(tmp_path, "one", _rows("a", 12)), _store(tmp_path, "two", _rows("b", 12))]
    mixed = MixedStore(stores, ["one", "two"])

    def loader(*weights):
        sampler = _sampler(mixed.sizes, weights, "first_exhausted", 3, mixed.lengths())
        return ResumableLoader(RowLists(mixed), sampler=sampler, batch_size=None, collate_fn=list)

    first = loader(1, 2)
    batches = [[row.row for row in batch] for batch in first]
    part = loader(1, 2)
    seen = iter(part)
    taken = [[row.row for row in next(seen)] for _ in range(2)]
    state = part.state_dict()
    resumed = loader(1, 2)
    resumed.load_state_dict(state)
    assert taken + [[row.row for row in batch] for batch in resumed] == batches
    with pytest.raises(ValueError, match="its rows are in another order"):
        loader(2, 1).load_state_dict(state)  # as many rows, but others


def test_names_of_mixtures():
    assert describe("a.jsonl") == "a.jsonl"
    assert describe(parts_of(["a", "b"])) == "a and 1 more"
    assert [part.name for part in parts_of("a.jsonl")] == ["a.jsonl"]
