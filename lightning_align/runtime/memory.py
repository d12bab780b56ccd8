"""The memory of a device, and reuse of freed memory on a CPU: a step allocates what the step before has freed."""

import ctypes
import os
import sys

import torch

# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# Users who set one of these have configured the allocator themselves.
CHOSEN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next allocation instead of returning it to the system.

    By default glibc maps every block above 32 MiB and unmaps it when it is freed. The kernel then clears the pages of every
    large activation in every training step, which takes a fifth of a step and more. With this setting the process keeps its
    peak memory, and about a tenth more because of fragmentation.

    Returns:
        Whether the setting was made. It is not made if an environment variable already configures the allocator (see
        `CHOSEN`), or if the C library is not glibc.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # At most 0 blocks are mapped by themselves, and the heap is never trimmed.
    return mallopt is not None and mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a device's memory. On a CPU, those of this rank's part of the machine. None if it is unknown."""
    if device.type == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    properties = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    return None if properties is None else int(properties(device).total_memory)
