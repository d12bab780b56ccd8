"""Memory that is freed and kept: what a step on a CPU allocates is what the step before has freed."""

import ctypes
import os
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# A user who has set one of these has decided for themselves.
CHOSEN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next allocation, rather than hand it back to the system.

    By default glibc maps every block of more than 32 MiB anew and unmaps it when it is freed, so that each activation of each
    training step is given, and cleared, by the kernel page by page: a fifth of a step and more. Kept, memory stays at the
    most that was in use, and about a tenth more, since what is free lies in pieces.

    Returns:
        Whether it was done: not where a variable of the environment already tells the allocator what to do (see `CHOSEN`), and
        not where the C library is another.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # 0 blocks may be mapped each by itself, and -1 is never to trim the heap they come from instead.
    return mallopt is not None and mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1
