import pickle

import pytest

from lightning_align.data.mapping import RowMapping
from lightning_align.data.store import Recipe, build_store, open_store, store_path
from lightning_align.data.tokenizer import ByteTokenizer
from tests.data.helpers import write_jsonl

TOKENIZER = ByteTokenizer()


def _recipe(**changes):
    settings = {
        "kind": "sft",
        "accepted": ("response", "text"),
        "max_length": 64,
        "truncation": "keep_start",
        "mask_turns": "last_turn",
        "on_bad_row": "fail",
    }
    return Recipe(**(settings | changes))


def _path(tmp_path, source, **changes):
    return store_path(source, split="train", recipe=_recipe(**changes), tokenizer=TOKENIZER, cache_dir=str(tmp_path / "c"))


def _build(tmp_path, source, **changes):
    path = _path(tmp_path, source, **changes)
    store, ledger = build_store(path, source=source, split="train", recipe=_recipe(**changes), tokenizer=TOKENIZER)
    return path, store, ledger


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p" * i, "response": "r"} for i in range(1500)])


def test_stored_rows_equal_the_encoded_rows(tmp_path, source):
    _, store, ledger = _build(tmp_path, source, truncation="keep_end")
    assert len(store) == ledger.num_kept == 1500
    row = store[2]
    assert row.sides[0].tokens.tolist() == [1, 115, 115, 117, 2]
    assert row.sides[0].targets.tolist() == [False, False, False, True, True]
    assert (row.row, row.num_prompt, row.sides[0].num_bytes) == (2, 3, 1)
    assert store[1499].row == 1499
    assert store.lengths().tolist() == [min(i + 3, 64) for i in range(1500)]
    assert ledger.counts == {"kept": 62, "prompt_trimmed": 1438}


def test_a_second_build_opens_the_first(tmp_path, source, monkeypatch):
    path, store, ledger = _build(tmp_path, source, truncation="drop")
    monkeypatch.setattr("lightning_align.data.build.read_pieces", None)
    _, again, ledger_again = _build(tmp_path, source, truncation="drop")
    assert again[7].sides[0].tokens.tolist() == store[7].sides[0].tokens.tolist()
    assert ledger_again.to_dict() == ledger.to_dict()
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.with_suffix(".json").name]


def test_everything_that_the_ids_depend_on_changes_the_name(tmp_path, source):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "p", "response": "r"}])
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    changes = [
        {},
        {"max_length": 65},
        {"truncation": "drop"},
        {"mask_turns": "all"},
        {"on_bad_row": "skip"},
        {"accepted": ("response",)},
        {"prompts_only": True},
        {"mapping": RowMapping(columns={"prompt": "response"})},
        {"mapping": RowMapping(roles={"human": "user"})},
        {"mapping": RowMapping(shape="plain")},
        {"mapping": RowMapping(ranked_pairs="all")},
    ]
    paths = [_path(tmp_path, source, **change) for change in changes]
    assert len({*paths, _path(tmp_path, other)}) == len(changes) + 1
    assert _path(tmp_path, str(copy)) == paths[0]


@pytest.mark.parametrize("damage", ["cut", "empty", "manifest", "not json"])
def test_a_damaged_store_is_rebuilt_with_a_warning(tmp_path, source, damage):
    path, _, _ = _build(tmp_path, source, truncation="drop")
    content = path.read_bytes()
    manifest = path.with_suffix(".json")
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        manifest.write_text("{}" if damage == "manifest" else "{")
    with pytest.warns(UserWarning, match="is damaged and will be rebuilt"):
        _build(tmp_path, source, truncation="drop")
    assert path.read_bytes() == content
    assert open_store(path) is not None


def test_a_store_without_ledger_is_none(tmp_path, source):
    path, _, _ = _build(tmp_path, source, truncation="drop")
    path.with_suffix(".json").unlink()
    assert open_store(path) is None
    _build(tmp_path, source, truncation="drop")
    assert open_store(path) is not None


def test_a_failed_build_leaves_no_files(tmp_path):
    source = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "response": "r"}] * 16 + ["{oops"])
    with pytest.raises(ValueError, match=r"bad\.jsonl:17 is not JSON"):
        _build(tmp_path, source)
    with pytest.raises(ValueError, match="no row of"):
        _build(tmp_path, write_jsonl(tmp_path / "none.jsonl", [{"prompt": "p"}]), on_bad_row="skip")
    assert list((tmp_path / "c").glob("*")) == []


def test_a_cache_folder_that_cannot_be_written(tmp_path, source):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(ValueError, match="cannot be written"):
        _build(tmp_path, source, truncation="drop")


def test_pickles_do_not_grow_with_the_rows(tmp_path, source):
    _, store, _ = _build(tmp_path, source, truncation="drop")
    assert store[0] is not None
    small = len(pickle.dumps(store))
    assert small < 600
    assert pickle.loads(pickle.dumps(store))[0].num_prompt == store[0].num_prompt


def test_plain_text_and_other_rows_do_not_mix(tmp_path):
    rows = [{"text": "a" * 100}, {"text": "b" * 50}]
    _, store, ledger = _build(tmp_path, write_jsonl(tmp_path / "text.jsonl", rows))
    assert store.lengths().tolist() == [64, 64, 26]
    assert ledger.counts == {"kept": 2}
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*rows, {"prompt": "p", "response": "r"}])
    with pytest.raises(ValueError, match=r"mixed\.jsonl:3 has no field 'text'"):
        _build(tmp_path, mixed)


def test_rows_of_several_pairs_are_numbered_by_pair(tmp_path):
    rows = [{"prompt": str(i), "responses": ["c", "b", "a"], "ranks": [3, 2, 1 if i != 1 else 2]} for i in range(3)]
    source = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "x", "chosen": "a", "rejected": "b"}])
    _, store, ledger = _build(tmp_path, source, accepted=("pair",), mapping=RowMapping(ranked_pairs="all"))
    assert [store[i].row for i in range(len(store))] == list(range(9))
    assert ledger.counts == {"kept": 9}
    assert ledger.notes["shape_ranked"] == 3
    bad = write_jsonl(tmp_path / "bad.jsonl", [*rows, {"prompt": "x", "responses": ["", "b"], "ranks": [1, 2]}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:4 has an empty text in field 'chosen'"):
        _build(tmp_path, bad, accepted=("pair",))
