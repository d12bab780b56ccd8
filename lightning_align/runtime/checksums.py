"""Checksums in JSON documents and beside files, by which readers notice damage.

Files without a checksum, as earlier releases and other programs write them, are read as they are.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_align.runtime.files import publish_text

SUMS = "SHA256SUMS"
"""The file with the checksums of a folder, as the program ``sha256sum`` writes and checks it."""
SEAL = "checksum"
"""The entry of a JSON document that holds the hash of the others."""
_SETTLED_NS = 2 * 10**9
"""The age of the last change after which a check counts. A second change could have the same time as a recent one."""
_checked: set[tuple[object, ...]] = set()


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 hash of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_once(path: Path, check: Callable[[], None], *, kind: str) -> None:
    """Check a file, unless this process has done so and the file has not been written since.

    Args:
        path: The file.
        check: Raises if the file is damaged.
        kind: Names what is checked.
    """
    found = path.stat()
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    state = (kind, os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if state not in _checked:
        check()
        if time.time_ns() - changed > _SETTLED_NS:
            _checked.add(state)


# -- JSON documents


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ValueError: If the file cannot be read or holds something else. The message names it.
    """
    try:
        return _object(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # damaged UTF-8 and JSON are ValueErrors too
        raise ValueError(f"{path} cannot be read ({error}). Write it again, or copy it again.") from error


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with the hash of its entries."""
    return {**content, SEAL: _digest(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """Return a JSON document without its hash.

    Args:
        content: What was read.

    Raises:
        ValueError: If it is no object, or its hash is of other entries.
    """
    rest = {name: value for name, value in _object(content).items() if name != SEAL}
    if SEAL in content and content[SEAL] != _digest(rest):
        raise ValueError("it was changed after it was written: its checksum differs")
    return rest


def _object(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"it must hold an object, but holds a {type(content).__name__}")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    # Read back first, because keys that are numbers become texts, which are sorted otherwise.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


# -- folders


def write_sums(folder: Path, *, without: tuple[str, ...] = ()) -> None:
    """Write the checksums of all files in a folder, also of those in its folders.

    Args:
        folder: The folder.
        without: Names of files that users may edit.
    """
    for inner in folder.glob(f"*/**/{SUMS}"):
        inner.unlink()  # these are the sums of parts, which are in the new file
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (SUMS, *without))
    publish_text(folder / SUMS, "".join(f"{file_hash(path)}  {path.relative_to(folder).as_posix()}\n" for path in files))


def check_sums(folder: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Compare the files of a folder with its checksums, if it has some. Ranks share the files.

    Args:
        folder: The folder, which may also be a name of the hub that is no folder.
        wanted: Chooses the files that will be read, by their names in the folder.

    Raises:
        ValueError: If a file is missing or has other bytes, or the checksums themselves are damaged.
    """
    path = Path(folder) / SUMS
    if not path.is_file():
        return
    from lightning_align.runtime.ranks import world  # only here: processes that tokenize rows do without PyTorch

    rank, ranks = world()
    for name, digest in _listed(path)[rank::ranks]:
        file = path.parent / name
        if not wanted(name):
            continue
        if not file.is_file():
            raise ValueError(f"{file} is missing, but {path} lists it. Copy or write the folder again.")
        check_once(file, partial(_check_hash, file, digest, path), kind=digest)


def _check_hash(file: Path, digest: str, path: Path) -> None:
    if file_hash(file) != digest:
        raise ValueError(
            f"{file} was changed after it was written: its SHA-256 differs from {path}. Copy or write the folder again, or "
            f"remove {SUMS} if you changed the file yourself."
        )


def _listed(path: Path) -> list[tuple[str, str]]:
    """Return the names and checksums in a file. No name leads out of its folder."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _unreadable(path, 1) from error
    for number, line in enumerate(lines, start=1):
        digest, _, name = line.partition("  ")
        parts = PurePosixPath(name).parts
        is_hash = len(digest) == 64 and set(digest) <= set("0123456789abcdef")
        if not is_hash or not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
            raise _unreadable(path, number)
        found.append((name, digest))
    return found


def _unreadable(path: Path, number: int) -> ValueError:
    return ValueError(
        f"{path}:{number} must be a SHA-256 hash, two spaces and the name of a file in the folder, but is not. Copy the folder "
        f"again, or remove {SUMS} to read the files unchecked."
    )
