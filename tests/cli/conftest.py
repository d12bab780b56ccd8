"""Fixtures of the tests of the command line."""

import sys
from pathlib import Path

import pytest

from tests.cli.runs import write_rows

ROWS = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(12)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # The command line's own arguments are not pytest's.
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    return tmp_path


@pytest.fixture
def sft_rows(folder: Path) -> str:
    return write_rows(folder / "sft.jsonl", ROWS)


@pytest.fixture
def pair_rows(folder: Path) -> str:
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(12)]
    return write_rows(folder / "pairs.jsonl", rows)
