"""Meters of time, memory and load. Linux only: load and memory come from /proc."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from lightning.pytorch.callbacks import Callback

MIB = 2**20
TICKS = os.sysconf("SC_CLK_TCK")
# Makes glibc ask for huge pages. A large new tensor then causes 1/512 of the page faults.
THP = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Meter:
    """Wall-clock time of a block, and the number of cores that other processes (and the hypervisor) kept busy."""

    seconds: float
    others: float

    def __enter__(self) -> Self:
        """Start."""
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        wall, busy, own = (stop - start for start, stop in zip(self._start, self._now(), strict=True))
        self.seconds = wall
        # A tick is 10 ms, so a short block may seem to have used more time than there was.
        self.others = max(0.0, (busy - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        own = os.times()
        return (
            time.perf_counter(),
            (user + nice + system + irq + softirq + steal) / TICKS,
            own.user + own.system + own.children_user + own.children_system,
        )


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    return _status("VmRSS")


def peak() -> int:
    """Peak resident memory of this process since `reset_peak`, in bytes."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Reset the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


class Memory:
    """Peak memory of a block above what was resident before it, in bytes."""

    bytes: int

    def __enter__(self) -> Self:
        """Start."""
        reset_peak()
        self._before = resident()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.bytes = peak() - self._before


def in_subprocess(script: str, *arguments: str, thp: bool = False) -> dict[str, Any]:
    """Run a script in its own process, so that no other side affects its memory.

    Args:
        script: its path.
        *arguments: its arguments.
        thp: whether malloc asks for huge pages.

    Returns:
        The JSON object in the last line of its output.
    """
    environment = {**os.environ, **(THP if thp else {})}
    output = subprocess.run(
        [sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


class Timing(NamedTuple):
    """Seconds of one round, and the background load meanwhile."""

    seconds: float
    others: float


class Clock(Callback):
    """Times each training step."""

    def __init__(self) -> None:
        self.timings: list[Timing] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.meter = Meter().__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.meter.__exit__()
        self.timings.append(Timing(self.meter.seconds, self.meter.others))


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int, *, cpu: bool = False) -> dict[str, list[Timing]]:
    """Run the sides in turns, so that background load affects all of them.

    Args:
        sides: what to run, by name.
        rounds: number of runs of each side. The caller does the warm-up.
        cpu: whether to count seconds of the processor, of all threads, in place of the clock's. Other load changes them less.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            with Meter() as meter:
                start = time.process_time()
                sides[name]()
                used = time.process_time() - start
            timings[name].append(Timing(used if cpu else meter.seconds, meter.others))
        order = order[1:] + order[:1]
    return timings


def median(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(list(values))


def ratio(ours: Sequence[Timing], peer: Sequence[Timing]) -> float:
    """Our time divided by the peer's: the median over rounds."""
    return median(a.seconds / b.seconds for a, b in zip(ours, peer, strict=True))


def load(timings: Sequence[Timing]) -> str:
    """Background load in cores: median and maximum over rounds."""
    return f"{median(t.others for t in timings):.2f} (max {max(t.others for t in timings):.2f})"
