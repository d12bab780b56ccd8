"""Run what is timed, the studies, or what is named, and write RESULTS.md beside this file; the others' sections stay."""

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
# What runs in which order, with which arguments: first what is timed, beside a peer or alone, which wants a quiet machine.
TIMED = (
    ("logprobs.py",),
    ("dpo_step.py",),
    ("dpo_step.py", "--thp"),
    ("stored_step.py",),
    ("reference_facts.py",),
    ("trainer_overhead.py",),
    ("kept_memory.py",),
    ("precision.py",),
    ("trl_dpo.py",),
    ("trl_dpo.py", "--thp"),
    ("trl_dpo.py", "--vocabulary", "128000", "--rounds", "2"),
    ("trl_sft.py",),
    ("trl_sft.py", "--thp"),
    ("generation.py", "--peer-length", "160", "--rounds", "2"),
    ("spin_step.py",),
    ("calm_step.py",),
    ("retrieval_chunks.py",),
    ("retrieval_vectors.py",),
    ("retrieval_search.py", "--queries", "8192"),
    ("retro_model_step.py",),
)
# Then what is learned, or survives: hours of training on two cores, on however busy a machine. Those with a .json beside
# them keep each run's result there and do what is missing.
STUDIES = (
    ("frontier.py",),
    ("spin_kill.py",),
    ("spin_markov.py",),
    ("spin_arithmetic.py",),
    ("spin_rows.py",),
    ("calm_key_value.py", "--seeds", "0", "1", "2"),
    ("retrieval_kill.py",),
    ("retro_model_facts.py",),
    ("retro_stdlib.py",),
)
SECTIONS = TIMED + STUDIES

OF_PAIRS = ("dpo_step.py", "trl_dpo.py", "trl_sft.py")


def machine() -> str:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    model = next(names, platform.processor())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def head() -> str:
    """The page's beginning."""
    return f"""# Benchmarks

{machine()}; Python {platform.python_version()}, torch {torch.__version__}.

Sides alternate within a process; ratios are medians of the ratios of neighbours. "Load of others" is the number of
cores that anything but the benchmark kept busy meanwhile: where it is not near 0, repeat before believing the row.
"""


def marker(script: str, options: tuple[str, ...]) -> str:
    """What begins a section's last line; its date follows."""
    return f"`python benchmarks/{shlex.join([script, *options])}"


def sections(page: str) -> dict[str, str]:
    """What a page has, by the line that each section ends with; a section may have several headings."""
    found, lines = {}, list[str]()
    for line in page[page.find("\n## ") + 1 :].splitlines() if "\n## " in page else ():
        lines.append(line)
        if line.startswith("`python benchmarks/"):
            found[line], lines = "\n".join(lines).strip() + "\n", []
    return found


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", help="what to measure, as dpo_step.py; where nothing is named, all that is timed")
    parser.add_argument("--studies", action="store_true", help="run what trains models for a result, which takes hours")
    parser.add_argument("--pairs", metavar="FILE", help=f"for {', '.join(OF_PAIRS)}: JSONL with prompt, chosen and rejected")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    arguments = parser.parse_args()
    names = {script for script, *_ in SECTIONS}
    if unknown := set(arguments.scripts) - names:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    old = arguments.output.read_text(encoding="utf-8") if arguments.output.exists() else ""
    kept = sections(old)
    done: dict[tuple[str, ...], str] = {}
    for script, *options in SECTIONS:
        for line, section in kept.items():
            if line.startswith(marker(script, tuple(options)) + "`"):
                done[script, *options] = section
    # Measured with other arguments than the list's: nothing here can make them again, so they stay, behind the others.
    others = [section for section in kept.values() if section not in done.values()]
    failed = []
    todo = [section for section in SECTIONS if section[0] in arguments.scripts] or (STUDIES if arguments.studies else TIMED)
    for number, (script, *options) in enumerate(todo, 1):
        extra = ["--pairs", arguments.pairs] if script in OF_PAIRS and arguments.pairs else []
        print(f"[{number}/{len(todo)}] {shlex.join([script, *options, *extra])}", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / script), *options, *extra]
        ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if ran.returncode:  # Its old section stays, and the others are measured all the same.
            failed.append(shlex.join([script, *options]))
            print(f"failed with exit status {ran.returncode}", file=sys.stderr, flush=True)
            continue
        # A path says nothing to a reader elsewhere.
        shown = f"{marker(script, tuple(options))}`" + (" with `--pairs FILE`" if extra else "")
        # What Trainers print comes before the section's heading.
        told = ran.stdout[max(0, ran.stdout.find("## ")) :].rstrip()
        done[script, *options] = f"{told}\n\n{shown}, {datetime.date.today().isoformat()}\n"
        # After every section, so that an interrupted run leaves what it has.
        page = [head(), *(done[script, *options] for script, *options in SECTIONS if (script, *options) in done), *others]
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text("\n".join(page), encoding="utf-8")
        temporary.replace(arguments.output)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the messages stand above")


if __name__ == "__main__":
    main()
