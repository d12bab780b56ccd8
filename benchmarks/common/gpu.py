"""What the scripts in `benchmarks/gpu` share: the device, timing on it, and reports that outlive a run that is stopped.

Nothing here or in the scripts calls CUDA with ``--dry-run``. The same code then runs on the CPU with tiny sizes.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measure import MIB
from benchmarks.common.report import table

REACHABLE_TFLOPS = 790.0
"""TFLOP/s of a large bfloat16 matrix product of random numbers on an H100 or H200, as measured. The datasheet says 989."""
DRY = "**Dry run on the CPU with tiny sizes. It shows that the script runs. The numbers mean nothing.**"


class Session:
    """One measurement: its device, its clock, and its results, which are written after each row.

    Args:
        name: Name of the script, which is that of the file of results.
        title: Title of the section.
        text: What is measured, a paragraph.
        arguments: What `parse` returned.
    """

    def __init__(self, name: str, title: str, text: str, arguments: argparse.Namespace) -> None:
        self.dry, self._start, self._limit = arguments.dry_run, time.monotonic(), arguments.seconds
        self.device = torch.device("cpu" if self.dry else "cuda:0")
        self._file = None if arguments.output is None else arguments.output / f"{name}.json"
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.results: dict[str, Any] = {
            "name": name,
            "title": title,
            "text": text,
            "dry_run": self.dry,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join([f"benchmarks/gpu/{name}.py", *sys.argv[1:]]),
            "machine": self._machine(),
            "tables": {},
            "failed": {},
            "complete": False,
        }
        self._save()

    def _machine(self) -> dict[str, Any]:
        found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        if not self.dry:
            properties = torch.cuda.get_device_properties(self.device)
            found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        # What the device reaches: a matrix product of random numbers, and a copy, counting bytes read and written.
        size, numbers = (128, 1 << 16) if self.dry else (8192, 1 << 30)
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        found["bf16_tflops"] = 2 * size**3 / self.median(functools.partial(torch.mm, a, b), rounds=10) / 1e12
        source = torch.randn(numbers, device=self.device).bfloat16()
        copy = functools.partial(torch.empty_like(source).copy_, source)
        found["copy_tb_per_s"] = 4 * numbers / self.median(copy, rounds=10) / 1e12
        del a, b, source, copy
        self.free()
        return found

    # -- the device

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Return unused memory to the device, and start a new peak."""
        if not self.dry:
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_mib(self) -> float:
        """Peak memory of tensors on the device since `free`, in MiB. Not known on the CPU."""
        return float("nan") if self.dry else torch.cuda.max_memory_allocated(self.device) / MIB

    def used_mib(self) -> float:
        """Memory of tensors on the device now, in MiB. Not known on the CPU."""
        return float("nan") if self.dry else torch.cuda.memory_allocated(self.device) / MIB

    def times(self, work: Callable[[], object], *, rounds: int, warmup: int = 3) -> list[float]:
        """Seconds of each of several runs on the device, by its own clock.

        Args:
            work: What to run. It starts work on the device and need not wait for it.
            rounds: The number of timed runs.
            warmup: The number of runs before them, for what compiles, plans and allocates.
        """
        for _ in range(1 if self.dry else warmup):
            work()
        self.synchronize()
        if self.dry:
            found = []
            for _ in range(min(rounds, 2)):
                start = time.perf_counter()
                work()
                found.append(time.perf_counter() - start)
            return found
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]

    def median(self, work: Callable[[], object], *, rounds: int, warmup: int = 3) -> float:
        """The median of `times`."""
        return statistics.median(self.times(work, rounds=rounds, warmup=warmup))

    # -- results

    def left(self) -> float:
        """Seconds until the script should end."""
        return self._limit - (time.monotonic() - self._start)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to a table, print it, and write the results."""
        self.results["tables"].setdefault(name, []).append({key: _cell(value) for key, value in row.items()})
        print(f"[{time.monotonic() - self._start:.0f} s] {name}: {row}", file=sys.stderr, flush=True)
        self._save()

    def note(self, key: str, value: Any) -> None:
        """Write something that belongs into no table to the file of results."""
        self.results.setdefault("notes", {})[key] = value
        self._save()

    @contextlib.contextmanager
    def part(self, name: str, *, needs: float = 0.0) -> Iterator[None]:
        """Run a part of the measurement. If it fails, it is recorded, and the next part runs.

        Args:
            name: Name of the part.
            needs: Seconds that it takes. If fewer are left, the measurement ends here.
        """
        if self.left() < needs:
            late = f"not run, and no part after it: {needs:.0f} s are needed, and {self.left():.0f} s were left"
            self.results["failed"][name] = late
            self.finish()
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip()[:600]}"
            self.results["failed"][name] = reason
            traceback.print_exc()
            print(f"[{time.monotonic() - self._start:.0f} s] {name} failed: {reason}", file=sys.stderr, flush=True)
            self._save()
        # Outside of the handler, where the traceback no longer keeps tensors alive.
        self.free()

    def finish(self) -> None:
        """Print the section, and exit with 1 if a part failed."""
        self.results["complete"], self.results["seconds"] = True, round(time.monotonic() - self._start, 1)
        self._save()
        print(markdown(self.results))
        sys.exit(1 if self.results["failed"] else 0)

    def _save(self) -> None:
        if self._file is None:
            return
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._file)


class Missing(Exception):
    """A part was not run, because a package is not installed."""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def markdown(results: dict[str, Any]) -> str:
    """The section of RESULTS.md, of complete or of interrupted results."""
    machine = results["machine"]
    where = machine.get("device", "the CPU")
    lines = [f"## GPU: {results['title']}", ""]
    if results["dry_run"]:
        lines += [DRY, ""]
    lines += [
        f"{results['text']} On {where}, torch {machine['torch']}, Python {machine['python']}. A bfloat16 matrix product "
        f"reaches {machine['bf16_tflops']:.4g} TFLOP/s here, and a copy {machine['copy_tb_per_s']:.3g} TB/s.",
        "",
    ]
    if not results["complete"]:
        lines += ["The run was stopped before its end.", ""]
    for name, rows in results["tables"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"{name}:", "", table([{key: row.get(key, "") for key in columns} for row in rows])]
    for name, reason in results["failed"].items():
        lines += [f"{name} failed. {reason}", ""]
    return "\n".join(lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, without a GPU; the numbers mean nothing")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="folder of the results as JSON; default: only print")
    made.add_argument("--seconds", type=float, default=450.0, help="parts that would begin too late are skipped")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line. It is an error if there is no CUDA device and none is pretended."""
    arguments = made.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        made.error("torch sees no CUDA device here; --dry-run runs tiny sizes on the CPU")
    if arguments.dry_run:
        torch.set_num_threads(1)
    return arguments
