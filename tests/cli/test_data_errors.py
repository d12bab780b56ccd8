"""Faults of data that a user may have: the command line says what is wrong, where, and what to do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_align.cli import run
from tests.cli.runs import config

GOOD = {"prompt": "q", "response": "a"}
LINE = json.dumps(GOOD).encode()


def start(folder: Path, **data: Any) -> None:
    trainer = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
    shown = {"enable_progress_bar": False, "enable_model_summary": False}
    Path("data.yaml").write_text(yaml.safe_dump({"data": {"init_args": data}}))
    run(["fit", "--config", config("sft", folder, trainer={**trainer, **shown}), "--config", "data.yaml"])


FILES = {
    "blank lines": ("rows.jsonl", b"\n\n", "rows.jsonl has no rows. Give a source"),
    "an empty array": ("rows.json", b"[]", "rows.json has no rows. Give a source"),
    "half a row": ("rows.jsonl", LINE + b"\n{oops", "rows.jsonl:2 is not JSON"),
    "a row over several lines": ("rows.jsonl", json.dumps(GOOD, indent=1).encode(), "must be one whole object"),
    "an array as a line": ("rows.jsonl", b"[" + LINE + b"]", "must be named .json"),
    "a name twice": (
        "rows.jsonl",
        b'{"prompt": "q", "prompt": "r", "response": "a"}',
        "rows.jsonl:1 has the field 'prompt' twice",
    ),
    "a name twice in an array": (
        "rows.json",
        b'[{"prompt": "q", "response": "a", "prompt": "r"}]',
        "row 1 has the field 'prompt' twice",
    ),
    "another encoding": (
        "rows.jsonl",
        '{"prompt": "\u00e9", "response": "a"}'.encode("latin-1"),
        "rows.jsonl:1 is not UTF-8: byte 13 is 0xe9",
    ),
    "UTF-16": ("rows.jsonl", LINE.decode().encode("utf-16"), "rows.jsonl:1 is not UTF-8"),
    "a NUL byte": ("rows.jsonl", LINE.replace(b"q", b"\0"), "rows.jsonl:1 is not JSON: Invalid control character"),
    "not a number": ("rows.jsonl", LINE.replace(b'"q"', b"NaN"), "rows.jsonl:1 has a value of type float in field 'prompt'"),
    "thousands of digits": ("rows.jsonl", LINE.replace(b'"q"', b"9" * 5000), "rows.jsonl:1 cannot be read"),
    "a column of some rows": (
        "rows.jsonl",
        LINE + b'\n{"prompt": "q"}',
        "rows.jsonl:2 has no field 'response' (it has 'prompt')",
    ),
    "no Parquet": ("rows.parquet", b"hello", "cannot be read as Parquet"),
    "half a file": ("rows.jsonl.gz", b"hello", "rows.jsonl.gz, after line 0: cannot be read"),
    "another type": ("rows.txt", LINE, "rows.txt has an unknown file type"),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_fault_of_a_file(fault: str, folder: Path) -> None:
    name, content, message = FILES[fault]
    Path(name).write_bytes(content)
    with pytest.raises(SystemExit, match=re.escape(message)):
        start(folder, train=name)


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + LINE, LINE + b"\r\n" + LINE + b"\r\n", LINE[:-1] + b', "n": ' + b"9" * 40 + b"}"]
)
def test_what_is_no_fault(content: bytes, folder: Path) -> None:
    Path("rows.jsonl").write_bytes(content)
    start(folder, train="rows.jsonl")


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a target of columns": ({"columns": {"promt": "prompt"}}, "got 'promt'. Set it to 'prompt'"),
    "a column": ({"columns": {"prompt": "promt"}}, "rows.jsonl:1 has no column 'promt', which `columns` names"),
    "a role": ({"roles": {"human": "usr"}}, "got 'usr'. Set it to 'user'"),
    "a weight of 0": (
        {"train": [{"source": "rows.jsonl", "weight": 0}, {"source": "rows.jsonl", "weight": 1}]},
        "must be a positive number, but got 0.0",
    ),
    "a negative weight": (
        {"train": [{"source": "rows.jsonl", "weight": -1}, {"source": "rows.jsonl", "weight": 1}]},
        "must be a positive number, but got -1.0",
    ),
    "a part that is missing": (
        {"train": [{"source": "rwos.jsonl", "weight": 1}, {"source": "rows.jsonl", "weight": 1}]},
        "there is no file rwos.jsonl",
    ),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_a_fault_of_a_setting(fault: str, folder: Path) -> None:
    settings, message = SETTINGS[fault]
    Path("rows.jsonl").write_bytes(LINE)
    with pytest.raises(SystemExit, match=re.escape(message)):
        start(folder, **{"train": "rows.jsonl", **settings})


@pytest.mark.parametrize(
    "settings", [{"colums": {"prompt": "q"}}, {"train": [{"source": "rows.jsonl", "colums": {"prompt": "q"}}]}]
)
def test_a_misspelt_argument_is_named_with_the_right_one(
    settings: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_bytes(LINE)
    with pytest.raises(SystemExit):
        start(folder, **{"train": "rows.jsonl", **settings})
    message = capsys.readouterr().err
    assert re.search(r"error: .*no argument 'colums[.\w]*'; did you mean 'columns'\?", message), message
    assert len(message.splitlines()) <= 4
