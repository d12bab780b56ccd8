"""Files that several processes write at the same time."""

import os
import socket
import threading
from pathlib import Path

import pytest

from lightning_align.runtime.files import check_writable, publish, temporary_path


def test_processes_of_one_number_on_two_nodes_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers on two nodes often have the same process ids. Both write the same file again and again."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path, faults = tmp_path / "shared.bin", list[str]()
    start = threading.Barrier(2)

    def work(node: int) -> None:
        content = bytes([node]) * 4096

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for begin in range(0, len(content), 512):
                    file.write(content[begin : begin + 512])
                    file.flush()

        start.wait()
        for _ in range(150):
            try:
                publish(path, write)
                found = path.read_bytes()
            except (ValueError, OSError) as error:
                faults.append(str(error))
            else:
                if found not in (b"\0" * 4096, b"\1" * 4096):
                    faults.append("mixed bytes")

    threads = [threading.Thread(target=work, args=(node,)) for node in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_temporary_names_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ("n" * 200)
    names = {temporary_path(path).name for _ in range(100)}
    monkeypatch.setattr(socket, "gethostname", lambda: "another" * 20)
    names |= {temporary_path(path).name for _ in range(100)}
    assert len(names) == 200
    assert all(name.startswith(".") and name.endswith(".tmp") and len(name.encode()) <= 255 for name in names)
    check_writable(path)
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_may_only_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)  # it says so even of a file that is not there
    with pytest.raises(ValueError, match=r"file: cannot be written \(Read-only file system\)"):
        publish(tmp_path / "file", refuse)
