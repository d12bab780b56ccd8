"""Hashes of files that were hashed before, so that a large file is not read again at every start."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning_align.runtime.files import publish_text

_LEAST_BYTES = 1 << 23
"""The size of a file that is worth it."""
_SETTLED_NS = 2 * 10**9
"""The age of the last change after which a hash is kept. A second change could have the same time as a recent one."""


def remembered_hash(path: str, compute: Callable[[str], str], *, folder: Path) -> str:
    """Return the hash of a file, computed or as it was kept in a folder.

    A kept hash is used only if the file has the same path, device, inode, size, time of modification and time of change as when
    it was computed. The operating system sets the time of change at every write, rename and change of the other times, so a
    file that was changed is hashed again, even if a program has set its time of modification back. Only a file system that does
    not keep these times can hide a change. Delete the folder to have all files hashed again.

    Args:
        path: The file.
        compute: Computes the hash of a file.
        folder: The folder of the kept hashes. It is created. Hashes are computed if it cannot be written.
    """
    try:
        before = _identity(path)
    except OSError:
        return compute(path)  # which raises the error
    if int(before["size"]) < _LEAST_BYTES:
        return compute(path)
    name = hashlib.sha256(str(before["path"]).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    kept = folder / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content["file"] == before:
            return str(content["hash"])
    result = compute(path)
    with suppress(OSError, ValueError):
        changed = max(int(before["modified"]), int(before["changed"]))
        if _identity(path) == before and time.time_ns() - changed > _SETTLED_NS:
            publish_text(kept, json.dumps({"file": before, "hash": result}, indent=2))
    return result


def _identity(path: str) -> dict[str, str | int]:
    found = os.stat(path)
    return {
        "path": os.path.realpath(path),
        "device": found.st_dev,
        "inode": found.st_ino,
        "size": found.st_size,
        "modified": found.st_mtime_ns,
        "changed": found.st_ctime_ns,
    }
