"""Access to the folder of a database: one build at a time, and folders that may only be read."""

import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_align.runtime.files import locked
from lightning_align.runtime.team import Team

LOCK = ".build.lock"
_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{16}\.tmp")
"""The names that `temporary_path` makes."""

_logger = logging.getLogger(__name__)


@contextmanager
def one_build(root: Path, team: Team) -> Iterator[None]:
    """Hold the lock of a database on rank 0. A build in another process waits, and then finds what this one has built.

    A folder that may only be read needs no lock: nothing can be written to it.

    Args:
        root: The folder of the database.
        team: The ranks.

    Raises:
        ValueError: If the path is that of a file, or the lock cannot be written.
    """
    if not root.is_dir() and (root.exists() or root.is_symlink()):
        what = "a file" if root.exists() else "a link that leads nowhere"
        raise ValueError(f"`folder` must be a folder for the database, but {root} is {what}. Choose another path.")
    if team.rank != 0 or is_read_only(root):
        yield
        return

    def tell(holder: str) -> None:
        _logger.warning("waiting for another process that builds %s (%s)", root, holder or "unknown")

    with locked(root / LOCK, on_wait=tell) as is_locked:
        if is_locked:
            remove_leftovers(root)
        else:
            warnings.warn(
                f"The file system of {root} has no locks, so builds in other processes are not noticed. Make sure that this is"
                " the only one, or build in a folder on a local disk and copy it.",
                stacklevel=6,
            )
        yield


def remove_leftovers(root: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder. Call it with the lock."""
    for path in root.glob(".*.tmp"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_read_only(root: Path) -> bool:
    """Return whether a folder exists and this process may not write to it."""
    return root.is_dir() and not os.access(root, os.W_OK)
