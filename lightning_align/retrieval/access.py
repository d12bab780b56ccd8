"""Access to the folder of a database: one build at a time, and folders that may only be read."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_align.runtime.files import locked
from lightning_align.runtime.team import Team

LOCK = ".build.lock"

_logger = logging.getLogger(__name__)


@contextmanager
def one_build(root: Path, team: Team) -> Iterator[None]:
    """Hold the lock of a database on rank 0. A build in another process waits, and then finds what this one has built.

    A folder that may only be read needs no lock: nothing can be written to it.

    Args:
        root: The folder of the database.
        team: The ranks.
    """
    if team.rank != 0 or is_read_only(root):
        yield
        return

    def tell(holder: str) -> None:
        _logger.warning("waiting for another process that builds %s (%s)", root, holder or "unknown")

    with locked(root / LOCK, on_wait=tell):
        yield


def is_read_only(root: Path) -> bool:
    """Return whether a folder exists and this process may not write to it."""
    return root.is_dir() and not os.access(root, os.W_OK)
