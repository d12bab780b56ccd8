"""Run every benchmark and write RESULTS.md beside this file."""

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
# What runs in which order, with which arguments.
SECTIONS = (
    ("logprobs.py",),
    ("dpo_step.py",),
    ("dpo_step.py", "--thp"),
    ("trainer_overhead.py",),
    ("precision.py",),
    ("calm_step.py",),
)


def machine() -> str:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    model = next(names, platform.processor())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def head(command: str) -> str:
    """The page's beginning."""
    return f"""# Benchmarks

Written by `{command}`, {datetime.date.today().isoformat()}: {machine()}; Python {platform.python_version()},
torch {torch.__version__}.

Sides alternate within a process; ratios are medians of the ratios of neighbours. "Load of others" is the number of
cores that anything but the benchmark kept busy meanwhile: where it is not near 0, repeat before believing the row.
"""


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", metavar="FILE", help="for the DPO step: JSONL with prompt, chosen and rejected")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    arguments = parser.parse_args()
    pairs = [] if arguments.pairs is None else ["--pairs", arguments.pairs]
    # A path says nothing to a reader elsewhere.
    page = [head("python benchmarks/run.py" + (" --pairs FILE" if pairs else ""))]
    for script, *options in SECTIONS:
        extra = pairs if script == "dpo_step.py" else []
        print(shlex.join([script, *options, *extra]), file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / script), *options, *extra]
        page.append(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        # After every section, so that an interrupted run leaves what it has.
        arguments.output.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
