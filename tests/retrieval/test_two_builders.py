"""Two processes that build one database at once, and are killed at random moments."""

import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest

from lightning_align.retrieval import access, encoders, neighbors
from lightning_align.retrieval import chunks as chunks_module
from lightning_align.retrieval.database import RetrievalDatabase
from tests.retrieval.helpers import Projection, hashes, texts
from tests.retrieval.test_build import build

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def start(root: Path, source: dict[str, str]) -> int:
    """Build in a child process, and return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which the child does not use
        child = os.fork()
    if child == 0:
        try:
            build(root, source, encoder=Projection(), rerank=True)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def end(child: int) -> None:
    """Wait for a child that must finish its build."""
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.study
def test_two_builders_that_are_killed_end_with_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_studies: bool
) -> None:
    for module, name, value in (
        (chunks_module, "BLOCK_BYTES", 800),
        (encoders, "BLOCK_CHUNKS", 64),
        (neighbors, "BLOCK_CHUNKS", 64),
    ):
        monkeypatch.setattr(module, name, value)
    source, draw, moments = texts(60), random.Random(0), 20 if full_studies else 3
    build(tmp_path / "whole", source, encoder=Projection(), rerank=True)
    wanted = hashes(tmp_path / "whole")
    root, number, kills = tmp_path / "db0", 0, 0
    while kills < moments:
        children = [start(root, source), start(root, source)]
        time.sleep(draw.uniform(0.01, 0.6))
        # One of them, or both: the one that builds, or the one that waits.
        for child in draw.sample(children, draw.randint(1, 2)):
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
            children.remove(child)
        for child in children:  # the other one goes on
            end(child)
        if (root / "database.json").exists():
            RetrievalDatabase.open(root).verify()
            end(start(root, source))  # finds it finished, and removes what was left
            assert hashes(root) == wanted
            number += 1
            root = tmp_path / f"db{number}"
    both = [start(root, source), start(root, source)]
    for child in both:
        end(child)
    assert hashes(root) == wanted and not (root / access.LOCK).exists()
