"""Hashes of files are kept, and a file that was changed is hashed again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_align.data import remembered
from lightning_align.data.remembered import remembered_hash


@pytest.fixture
def hash_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[str, bool]]:
    """Return the hash of a file, and whether the file was read."""
    monkeypatch.setattr(remembered, "_LEAST_BYTES", 4)
    monkeypatch.setattr(remembered, "_SETTLED_NS", 0)

    def function(path: Path) -> tuple[str, bool]:
        read: list[str] = []

        def compute(name: str) -> str:
            read.append(name)
            return Path(name).read_text()

        return remembered_hash(str(path), compute, folder=tmp_path / "hashes"), bool(read)

    return function


def test_a_file_is_read_once(tmp_path: Path, hash_of: Callable[[Path], tuple[str, bool]]) -> None:
    path = tmp_path / "rows"
    path.write_text("12345")
    assert [hash_of(path) for _ in range(3)] == [("12345", True), ("12345", False), ("12345", False)]
    shutil.rmtree(tmp_path / "hashes")
    assert hash_of(path) == ("12345", True)


def test_every_change_is_noticed(tmp_path: Path, hash_of: Callable[[Path], tuple[str, bool]]) -> None:
    path, other = tmp_path / "rows", tmp_path / "other"
    path.write_text("12345")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    assert hash_of(path) == ("12345", True)
    path.write_text("54321")
    os.utime(path, ns=times)  # size and time of modification are as before
    assert hash_of(path) == ("54321", True)
    other.write_text("67890")
    os.utime(other, ns=times)
    os.replace(other, path)
    assert hash_of(path) == ("67890", True)
    (tmp_path / "hashes" / next((tmp_path / "hashes").iterdir()).name).write_text("{")
    assert hash_of(path) == ("67890", True)
    assert hash_of(path) == ("67890", False)


def test_recent_changes_and_small_files_are_not_kept(
    tmp_path: Path, hash_of: Callable[[Path], tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows"
    path.write_text("123")
    assert [hash_of(path), hash_of(path)] == [("123", True)] * 2
    monkeypatch.setattr(remembered, "_SETTLED_NS", 10**15)
    path.write_text("12345")
    assert [hash_of(path), hash_of(path)] == [("12345", True)] * 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, hash_of: Callable[[Path], tuple[str, bool]]) -> None:
    (tmp_path / "hashes").write_text("a file")
    path = tmp_path / "rows"
    path.write_text("12345")
    assert [hash_of(path), hash_of(path)] == [("12345", True)] * 2
