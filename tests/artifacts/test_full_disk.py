"""A disk that is full while a file is written: one line says so, and nothing half-written is read."""

import json
import os
import resource
from pathlib import Path

import pytest

from tests.artifacts.damage import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.* is damaged"),
]
OF_TORCH = ("checkpoint", "sharded checkpoint")
"""torch and Lightning write these, and raise errors of their own."""


def make_limited(name: str, folder: Path, most: int) -> tuple[str, str]:
    """Make an artifact in a fork that can write no file of more bytes. Return the type and the text of its error."""
    receive, send = os.pipe()
    process = os.fork()
    if process == 0:
        told = ("", "")
        try:
            # Python ignores the signal, so writes fail with an error, as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            KINDS[name].make(folder)
        except BaseException as error:
            told = (type(error).__name__, str(error))
        finally:
            os.write(send, json.dumps(told).encode()[:60_000])
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as file:
        kind, text = json.loads(file.read())
    os.waitpid(process, 0)
    return kind, text


@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk(name: str, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    whole.mkdir()
    half.mkdir()
    KINDS[name].make(whole)
    expected = KINDS[name].read(whole)
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    kind, text = make_limited(name, half, largest // 2)
    assert kind, "the limit was not reached"
    if name not in OF_TORCH:
        assert kind in ("ValueError", "OSError"), (kind, text)
        assert str(half) in text and "\n" not in text, text
    left = [path for path in half.rglob("*") if path.is_file() and path.suffix in (".tmp", ".partial")]
    assert not left, left
    try:
        found = KINDS[name].read(half)
    except (ValueError, FileNotFoundError):
        return
    assert found == expected, "what was half-written is used"
