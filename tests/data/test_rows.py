import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_align.data.rows import Grader, RowTask, read_rows, source_fingerprint
from tests.data.helpers import write_jsonl

ROWS = [{"prompt": "a,\n", "response": "12"}, {"prompt": "b\u2028", "response": ""}]


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
    origins = {
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


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv", "blank.jsonl", "empty.parquet"])
def test_empty_files(tmp_path, name):
    (tmp_path / "empty.jsonl").write_text("")
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
    with pytest.raises(ValueError, match=r"is a folder.*did you mean .*train\.jsonl"):
        read_rows(str(tmp_path))
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
