import gzip
import json
import os
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_align.data.rows import Grader, RowTask, read_rows, source_fingerprint, source_name
from tests.data.helpers import write_jsonl

ROWS = [{"prompt": "a,\n", "response": "12"}, {"prompt": "b\u2028", "response": ""}]


def _zstandard(content):
    return pa.compress(content, codec="zstd", asbytes=True)


def _names(rows):
    return [os.path.basename(row.origin) for row in rows]


class Two(RowTask):
    fingerprint = "two"

    def rows(self):
        yield from ROWS


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    lines = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(Path(lines).read_text(encoding="utf-8"))
    (tmp_path / "rows.csv").write_text('prompt,response\n"a,\n",12\nb\u2028,\n', encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    text = Path(lines).read_bytes()
    half = text.index(b"\n") + 1
    (tmp_path / "rows.jsonl.zst").write_bytes(_zstandard(text[:half]) + _zstandard(text[half:]))
    (tmp_path / "lines.json").write_bytes(text)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS, ensure_ascii=False).encode()))
    table = pa.Table.from_pylist(ROWS)
    for name, new in (("rows.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    origins = {
        "rows.jsonl.zst": ["rows.jsonl.zst:1", "rows.jsonl.zst:2"],
        "lines.json": ["lines.json:1", "lines.json:2"],
        "rows.json": ["rows.json, row 1", "rows.json, row 2"],
        "rows.json.gz": ["rows.json.gz, row 1", "rows.json.gz, row 2"],
        "rows.arrow": ["rows.arrow, row 1", "rows.arrow, row 2"],
        "stream.arrow": ["stream.arrow, row 1", "stream.arrow, row 2"],
        "rows.jsonl": ["rows.jsonl:1", "rows.jsonl:2"],
        "rows.jsonl.gz": ["rows.jsonl.gz:1", "rows.jsonl.gz:2"],
        "rows.csv": ["rows.csv:3", "rows.csv:4"],
        "rows.parquet": ["rows.parquet, row 1", "rows.parquet, row 2"],
    }
    for name, expected in origins.items():
        rows = list(read_rows(str(tmp_path / name)))
        assert [row.fields for row in rows] == ROWS, name
        assert [os.path.basename(row.origin) for row in rows] == expected
    rows = list(read_rows(Two()))
    assert [row.fields for row in rows] == ROWS
    assert rows[1].origin == "Two, row 2"
    assert not isinstance(Two(), Grader)


def test_bad_lines_are_rows_with_a_problem(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "x"}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n{bad\n" + b'{"a": "\xff"}\n[1]\n' + good + b"\n")
    rows = list(read_rows(str(path)))
    assert [row.origin.rsplit(":")[-1] for row in rows] == ["1", "3", "4", "5", "6"]
    assert [row.problem[:12] for row in rows] == ["", "is not JSON:", "is not UTF-8", "is a JSON li", ""]


def test_surrogates_and_very_long_numbers_are_problems_of_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = r'{"messages": [{"role": "user", "content": "\uDE00"}]}'
    lines = [r'{"prompt": "\ud83d\ude00", "other": "\\ud83d"}', r'{"prompt": "\ud83d"}', messages, '{"a": ' + "9" * 5000 + "}"]
    path.write_text("\n".join(lines))
    whole, *others = read_rows(str(path))
    assert whole.fields == {"prompt": "\N{GRINNING FACE}", "other": r"\ud83d"} and not whole.problem
    assert [row.origin.rsplit(":")[-1] for row in others] == ["2", "3", "4"]
    assert others[0].problem.startswith(r"has half a character, '\ud83d', in field 'prompt'")
    assert others[1].problem.startswith(r"has half a character, '\ude00', in field 'messages'")
    assert others[2].problem.startswith("cannot be read: Exceeds the limit")


def test_a_csv_line_with_missing_fields(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response\na,b\nc\n")
    assert [bool(row.problem) for row in read_rows(str(tmp_path / "rows.csv"))] == [False, True]


def test_a_csv_field_may_be_long(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response\na," + "b" * 200_000 + "\n")
    (row,) = read_rows(str(tmp_path / "rows.csv"))
    assert len(row.fields["response"]) == 200_000 and not row.problem


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv", "blank.jsonl", "empty.parquet", "empty.json"])
def test_empty_files(tmp_path, name):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.json").write_text(" [ ] ")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "empty.csv").write_text("prompt,response\n")
    pq.write_table(pa.Table.from_pylist([], schema=pa.schema([("prompt", pa.string())])), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=f"{name} has no rows"):
        list(read_rows(str(tmp_path / name)))


def test_wrong_paths_suggest_similar_files(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"no file .*trian.jsonl .*searched in .*similar files: .*train\.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ValueError, match=r"folder .*data does not exist"):
        read_rows(str(tmp_path / "data" / "train.jsonl"))
    with pytest.raises(ValueError, match="not the name of a hub dataset either"):
        read_rows(str(tmp_path / "train"))
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"unknown file type.*\.jsonl"):
        read_rows(str(tmp_path / "rows.xlsx"))


def test_truncated_and_invalid_files(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_rows(str(tmp_path / "cut.jsonl.gz")))
    (tmp_path / "false.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        list(read_rows(str(tmp_path / "false.parquet")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    path.chmod(0)
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_rows(str(path)))


def test_fingerprints_depend_on_the_content(tmp_path):
    one, two = write_jsonl(tmp_path / "one.jsonl", ROWS), write_jsonl(tmp_path / "two.jsonl", ROWS)
    other = write_jsonl(tmp_path / "other.jsonl", ROWS[:1])
    assert source_fingerprint(one) == source_fingerprint(two) != source_fingerprint(other)
    assert source_fingerprint(Two()).endswith("Two:two")


def test_several_files_are_read_one_after_the_other(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    paths = [write_jsonl(folder / f"part-{i}.jsonl", [{"prompt": f"{i}"}] * 2) for i in (2, 0, 1)]
    (folder / ".hidden.jsonl").write_text("{")
    write_jsonl(folder / "part-3.jsonl", [])
    for source in (str(folder), f"{folder}/part-*.jsonl", f"{tmp_path}/**/part-[0-9].jsonl", sorted(paths)):
        assert _names(read_rows(source)) == [f"part-{i}.jsonl:{line}" for i in range(3) for line in (1, 2)], source
    assert [row.fields["prompt"] for row in read_rows([paths[0], paths[1]])] == ["2", "2", "0", "0"]
    assert source_name(paths) == f"{paths[0]} and 2 more"
    with pytest.raises(ValueError, match="list of sources is empty"):
        read_rows([])


def test_the_fingerprint_of_several_files_covers_each_of_them(tmp_path):
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name}]) for name in ("one", "two"))
    before = source_fingerprint([one, two])
    assert before == source_fingerprint(str(tmp_path)) == source_fingerprint(f"{tmp_path}/*.jsonl")
    assert len({before, source_fingerprint([two, one]), source_fingerprint(one), source_fingerprint([one, two, two])}) == 4
    write_jsonl(tmp_path / "two.jsonl", [{"prompt": "three"}])
    assert source_fingerprint([one, two]) != before


def test_a_folder_of_several_splits_or_kinds_is_not_mixed(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    with pytest.raises(ValueError, match=r"several splits \(test, train\).*test\*"):
        read_rows(str(tmp_path))
    assert len(list(read_rows(f"{tmp_path}/train*"))) == 4
    (tmp_path / "test-0.jsonl").rename(tmp_path / "info.json")
    with pytest.raises(ValueError, match=r"several kinds \(\.json, \.jsonl\)"):
        read_rows(str(tmp_path))
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ValueError, match=r"matches .*README\.md, which has an unknown"):
        read_rows(f"{tmp_path}/*")
    with pytest.raises(ValueError, match=r"no file matches .*\*\.parquet"):
        read_rows(f"{tmp_path}/*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without files of rows"):
        read_rows(str(tmp_path / "empty"))


def test_folders_of_saved_datasets(tmp_path):
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list([{"prompt": str(i), "messages": [{"role": "user"}]} for i in range(5)])
    # Filtered and shuffled datasets are stored in their own order.
    whole.filter(lambda row: row["prompt"] != "1").shuffle(seed=1).save_to_disk(tmp_path / "one", num_shards=2)
    expected = [row["prompt"] for row in datasets.load_from_disk(tmp_path / "one")]
    rows = list(read_rows(str(tmp_path / "one")))
    assert [row.fields["prompt"] for row in rows] == expected and sorted(expected) == ["0", "2", "3", "4"]
    assert _names(rows)[2] == "data-00001-of-00002.arrow, row 1"
    datasets.DatasetDict({"train": whole, "test": whole.select([3])}).save_to_disk(tmp_path / "two")
    folder = str(tmp_path / "two")
    assert len(list(read_rows(folder))) == 5
    for source, split in ((folder, "test"), (f"{folder}:test", "train")):
        assert [row.fields["prompt"] for row in read_rows(source, split=split)] == ["3"]
    with pytest.raises(ValueError, match=r"no split 'validation'\. Choose one of .*two:train, .*two:test"):
        read_rows(folder, split="validation")
    with pytest.raises(ValueError, match=r"no splits to choose 'test' from"):
        read_rows(f"{tmp_path / 'one'}:test")


def test_a_json_array_larger_than_what_is_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_align.data.files._CHUNK", 7)
    expected = [{"prompt": 'ä\u2028[{"' * i, "nested": [{"x": i}, [1.5e3, None]]} for i in range(40)]
    for indent, ensure_ascii in ((None, False), (1, True)):
        text = json.dumps(expected, indent=indent, ensure_ascii=ensure_ascii)
        (tmp_path / "rows.json").write_text("\ufeff" + text, encoding="utf-8")
        rows = list(read_rows(str(tmp_path / "rows.json")))
        assert [row.fields for row in rows] == expected
        assert rows[-1].origin.endswith("rows.json, row 40")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": }]', r"bad\.json:2, after row 1: is not a JSON array"),
        ('[{"a": 1},\n\n{"a": 2}', r"bad\.json:3, after row 2: .* ends without '\]'"),
        ('[{"a": 1} {"a": 2}]', r"after row 1: .*expected ',' or '\]', but got '\{'"),
        ('[{"a": 1}] x', "after row 1: .*'x' follows its end"),
        ('{\n "data": [{"a": 1}]\n}', "one array of objects, or one object per line"),
        (b'[{"a": "\xff"}]', "cannot be read"),
    ],
)
def test_broken_json_files_name_the_line(tmp_path, text, message):
    (tmp_path / "bad.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        list(read_rows(str(tmp_path / "bad.json")))


def test_bad_elements_of_a_json_array_are_rows_with_a_problem(tmp_path):
    (tmp_path / "rows.json").write_text(r'[1, {"a": "\ud83d"}, {"a": "\ud83d\ude00"}, [2]]')
    problems = [row.problem[:20] for row in read_rows(str(tmp_path / "rows.json"))]
    assert problems == ["is a JSON int, expec", "has half a character", "", "is a JSON list, expe"]


def test_a_zstandard_file_that_is_cut(tmp_path):
    (tmp_path / "cut.jsonl.zst").write_bytes(_zstandard(b'{"a": 1}\n' * 1000)[:-8])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.zst, after line .*cannot be read"):
        list(read_rows(str(tmp_path / "cut.jsonl.zst")))


def test_only_hub_names_need_the_package_datasets(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for name in ("datasets", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("saved", "rows.parquet"):
        assert [row.fields for row in read_rows(str(tmp_path / name))] == ROWS
    with pytest.raises(ValueError, match=r"'someone/something' is not a file .*install the package `datasets`.*extra `hub`"):
        list(read_rows("someone/something"))


def test_a_hub_dataset_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(ValueError, match=r"neither a file .*offline"):
        list(read_rows("someone/something:test"))


def test_rows_of_a_hub_dataset(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in ("a/b", "a/b:test", "a/b:part:test"):
        assert [row.fields for row in read_rows(name, split="validation")] == ROWS
    assert asked == [("a/b", None, "validation"), ("a/b", None, "test"), ("a/b", "part", "test")]
