"""Pages of mapped files: they count as memory of the process until the system takes them back, or the process returns them."""

import ctypes
import mmap
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

LIMIT = 1 << 27
"""Bytes of mapped files that stay in memory, beyond what `release_pages` cannot return."""

_kept = 0
"""The bytes that were left after the last call that returned pages."""


def release_pages(folder: Path, *, limit: int = LIMIT) -> bool:
    """Return the pages of the mapped files in a folder to the system, if mapped files take much of the memory of the process.

    The system keeps the pages in its cache while it has room, so reading them again is fast. Nothing must have been written to
    the mapped files through memory. Other systems than Linux return pages themselves, and nothing is done.

    Args:
        folder: The folder. The files of its folders are included.
        limit: Bytes of mapped files above which pages are returned.

    Returns:
        Whether pages were returned.
    """
    global _kept
    if not sys.platform.startswith("linux"):
        return False
    taken = _mapped_bytes()
    _kept = min(_kept, taken)  # files may have been closed
    if taken - _kept <= limit:
        return False
    place = os.fsencode(folder.resolve()) + b"/"
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(place) and b"x" not in fields[1]:
            start, stop = (int(part, 16) for part in fields[0].split(b"-"))
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
    # Code of libraries and files of other folders stay. Without this, each later call would try again to return them.
    _kept = _mapped_bytes()
    return True


def _mapped_bytes() -> int:
    """Return the bytes of files, and of files in memory such as those of /dev/shm, that are mapped and in memory."""
    lines = Path("/proc/self/status").read_bytes().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith((b"RssFile:", b"RssShmem:")))


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
