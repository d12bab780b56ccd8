"""Run benchmarks and studies, and write their results to RESULTS.md.

python benchmarks/run.py                        all benchmarks
python benchmarks/run.py --peers                comparisons with other libraries, with fewer rounds
python benchmarks/run.py --studies              all studies
python benchmarks/run.py dpo/step.py            the named scripts; other sections, and those of other processors, stay
python benchmarks/run.py dpo/step.py --rounds 2 one script with options of your own; RESULTS.md stays as it is
python benchmarks/run.py --list                 what there is
"""

import argparse
import ast
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Each entry is a section of RESULTS.md: a script and its options. Benchmarks measure time or memory and need a quiet machine.
TIMED: tuple[tuple[str, ...], ...] = (
    ("scoring/logprobs.py",),
    ("scoring/peaked.py",),
    ("data/prepare.py", "--rows", "10000", "100000", "1000000"),
    ("dpo/step.py",),
    ("dpo/step.py", "--thp"),
    ("dpo/stored_step.py",),
    ("dpo/reference.py",),
    ("dpo/trl_losses.py",),
    ("training/trainer_overhead.py",),
    ("training/bound.py", "--rounds", "3", "--threads", "1"),
    ("training/kept_memory.py",),
    ("training/precision.py",),
    ("training/compile.py",),
    ("training/stored.py",),
    ("dpo/trl_step.py",),
    ("dpo/trl_step.py", "--thp"),
    ("dpo/trl_step.py", "--vocabulary", "128000", "--rounds", "2"),
    ("dpo/shared_prefix.py", "--size", "1", "--rounds", "1"),
    ("dpo/shared_prefix.py", "--size", "4", "--rounds", "1"),
    ("dpo/shared_prefix.py", "--lora", "--size", "1", "--rounds", "2"),
    ("sft/trl_step.py",),
    ("sft/trl_step.py", "--thp"),
    ("sft/packing.py",),
    ("generation/sampling.py", "--peer-length", "160", "--rounds", "2"),
    ("generation/common_prefix.py", "--rounds", "2", "--threads", "1"),
    ("generation/prompt_lookup.py",),
    ("generation/int8.py",),
    ("generation/continuous.py", "--lengths", "random", "--batch-sizes", "64", "16", "--mean", "32", "--rounds", "1"),
    ("spin/step.py",),
    ("calm/step.py",),
    ("calm/recompute.py",),
    ("calm/own_tokenizer.py",),
    ("retrieval/chunks.py",),
    ("retrieval/vectors.py",),
    ("retrieval/search.py", "--queries", "8192"),
    ("retrieval/lexical.py",),
    ("retrieval/lexical.py", "--text", "real"),
    ("retrieval/engines.py",),
    ("retro/memory.py", "--sizes", "40", "--lines"),
    ("retro/planted_copies.py",),
    ("retro/step.py",),
)
# The comparisons with other libraries, and what follows their options so that all of them take 40 minutes on two cores. All
# of `TIMED` takes about 100 minutes there.
PEERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("scoring/logprobs.py",): ("--rounds", "1"),
    ("data/prepare.py", "--rows", "10000", "100000", "1000000"): ("--rows", "10000", "100000", "--rounds", "1"),
    ("dpo/step.py",): ("--rounds", "4"),
    ("dpo/trl_step.py",): ("--rounds", "2"),
    ("dpo/shared_prefix.py", "--size", "1", "--rounds", "1"): (),
    ("sft/trl_step.py",): ("--rounds", "2"),
    ("generation/sampling.py", "--peer-length", "160", "--rounds", "2"): ("--rounds", "1"),
    ("generation/common_prefix.py", "--rounds", "2", "--threads", "1"): ("--rounds", "1"),
    ("spin/step.py",): (),
    ("calm/step.py",): ("--rounds", "3"),
    ("retrieval/chunks.py",): (),
    ("retrieval/vectors.py",): (),
    ("retrieval/search.py", "--queries", "8192"): ("--rounds", "2"),
    ("retro/step.py",): ("--rounds", "3"),
}
# Studies train models and look at what they learned, or kill runs and look at what survived. They take hours; other load on the
# machine does not matter. A study with a .json file beside it stores each result there and runs only what is missing.
STUDIES = (
    ("studies/long_runs.py",),
    ("studies/kills.py",),
    ("studies/nodes.py",),
    ("studies/dpo/frontier.py",),
    ("studies/dpo/pretrained.py",),
    ("studies/dpo/betas.py", "--seeds", "0"),
    ("studies/dpo/betas.py", "--task", "calculations", "--arms", "beta 0.1", "random labels"),
    ("studies/spin/kill.py",),
    ("studies/spin/markov.py",),
    ("studies/spin/crossing.py",),
    ("studies/spin/arithmetic.py",),
    ("studies/spin/rows.py",),
    ("studies/spin/pretrained.py", "--arms", "before", "start", "sft", "spin"),
    tuple("studies/spin/pretrained.py --rows 64 --start-epochs 20 --seeds 0 1 --arms before start sft spin".split()),
    ("studies/calm/key_value.py", "--seeds", "0", "1", "2"),
    ("studies/calm/pretrained.py",),
    (
        *"studies/calm/pretrained.py --words 1000 --held-in 0.6 --one-word 0.4 --augment-steps 800".split(),
        *"--precision bf16-mixed".split(),
    ),
    ("studies/retro/database_kill.py",),
    ("studies/retro/facts.py",),
    ("studies/retro/stdlib.py",),
    tuple("studies/retro/pretrained.py --steps 300 --schedule 300 --precision bf16-mixed --each".split()),
    (
        *"studies/retro/pretrained.py --reuse-decoder --steps 300 --schedule 300 --learning-rate 5e-4".split(),
        *"--precision bf16-mixed --each --seeds 0 1 2".split(),
    ),
)
SECTIONS = TIMED + STUDIES

OF_PAIRS = ("data/prepare.py", "dpo/step.py", "dpo/trl_step.py", "sft/trl_step.py")


def pairs_options(script: str, pairs: str | None) -> list[str]:
    """Return the options that hand a file of pairs to a script, if it takes one."""
    return ["--pairs", pairs] if script in OF_PAIRS and pairs else []


def processor() -> str:
    """The kind of processor that runs this. Ratios differ by kind, so a page has a section for each."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in info)}
    model = re.sub(r"\((?:R|TM)\)|\b(?:Processor|CPU)\b|@.*", "", found.get("model name", "") or platform.processor())
    name = " ".join(model.split()) or platform.machine()
    return f"{name} with AMX" if "amx_bf16" in found.get("flags", "").split() else name


def head() -> str:
    """The first lines of the page."""
    return """# Benchmarks

The sides of a comparison take turns in one run. Each ratio is the median of the ratios of neighboring rounds. "Background
load" is the number of cores that other processes kept busy. Where it is not near 0, repeat the run before you trust the row.

The last line of a section has its command, its date and its machine. Ratios differ by processor: a command that ran on two
kinds has two sections.
"""


def listing() -> str:
    """The scripts, each with the first line of its docstring."""
    lines = []
    for title, sections_ in (("Benchmarks:", TIMED), ("Studies:", STUDIES)):
        lines.append(title)
        for script in dict.fromkeys(script for script, *_ in sections_):
            about = ast.get_docstring(ast.parse((HERE / script).read_text(encoding="utf-8"))) or ""
            lines.append(f"  {script:<30} {about.splitlines()[0]}")
    return "\n".join(lines)


def marker(script: str, options: tuple[str, ...]) -> str:
    """The start of a section's last line, before the date."""
    return f"`python benchmarks/run.py {shlex.join([script, *options])}"


def sections(page: str) -> dict[str, str]:
    """The sections of a page, by their last line. A section may have several headings."""
    found, lines = {}, list[str]()
    for line in page[page.find("\n## ") + 1 :].splitlines() if "\n## " in page else ():
        lines.append(line)
        if line.startswith("`python benchmarks/"):
            found[line], lines = "\n".join(lines).strip() + "\n", []
    return found


def machine(section: str) -> str:
    """The kind of processor that a section was measured on."""
    return re.split(r", \d{4}-\d\d-\d\d, ", section.rstrip().splitlines()[-1])[-1].partition(", ")[0]


def start(script: str, *options: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that can import `benchmarks` and this checkout's `lightning_align`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(HERE / script), *options],
        check=False,
        stdout=subprocess.PIPE if capture else None,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def summary(outputs: list[str]) -> str:
    """All claims of some sections in one table, each with the heading above it, and the machine that measured them."""
    rows = []
    for output in outputs:
        title, inside = "", False
        for line in output.splitlines():
            title = line.removeprefix("## ") if line.startswith("## ") else title
            inside = line.startswith("| claim |") or (inside and line.startswith("|"))
            if inside and not line.startswith(("| claim |", "| --- |")):
                rows.append(f"| {title} {line}")
    if not rows:
        return ""
    columns = "| benchmark | claim | required | measured |  |\n| --- | --- | --- | --- | --- |"
    return "\n".join([f"All claims on {processor()}, {os.cpu_count()} cores:", "", columns, *rows])


def record(todo: dict[tuple[str, ...], tuple[str, ...]], pairs: str | None, output: Path) -> list[str]:
    """Run sections and write the page after each of them, so that an interrupted run keeps what it has. Print their claims.

    Args:
        todo: the sections, and further options of each.
        pairs: a file for the scripts that take pairs.
        output: the page; its other sections stay.

    Returns:
        The commands that failed.
    """
    kept = sections(output.read_text(encoding="utf-8") if output.exists() else "")
    done: dict[tuple[str, ...], str] = {}
    here = processor()
    elsewhere: dict[tuple[str, ...], list[str]] = {section: [] for section in SECTIONS}
    for script, *options in SECTIONS:
        for line, section in kept.items():
            if line.startswith(marker(script, tuple(options)) + "`"):
                if f", {here}, " in line:
                    done[script, *options] = section
                else:
                    elsewhere[script, *options].append(section)
    # Sections of commands that are not in the list stay at the end: nothing here can make them again.
    listed = {*done.values(), *chain.from_iterable(elsewhere.values())}
    others = [section for section in kept.values() if section not in listed]
    failed, outputs = [], []
    began = time.monotonic()
    for number, ((script, *options), more) in enumerate(todo.items(), 1):
        extra = [*more, *pairs_options(script, pairs)]
        print(f"[{number}/{len(todo)}] {shlex.join([script, *options, *extra])}", file=sys.stderr, flush=True)
        ran = start(script, *options, *extra, capture=True)
        print(ran.stdout, flush=True)
        print(f"{(time.monotonic() - began) / 60:.1f} minutes so far", file=sys.stderr, flush=True)
        if ran.returncode:  # The old section stays, and the other scripts still run.
            failed.append(shlex.join([script, *options]))
            print(f"failed with exit status {ran.returncode}", file=sys.stderr, flush=True)
            continue
        # The path of the pairs means nothing to a reader.
        told_options = shlex.join([*more, *(["--pairs", "FILE"] if len(extra) > len(more) else [])])
        shown = f"{marker(script, tuple(options))}`" + (f" with `{told_options}`" if told_options else "")
        # Skip what a Trainer prints before the section's heading.
        told = ran.stdout[max(0, ran.stdout.find("## ")) :].rstrip()
        outputs.append(told)
        last = f"{shown}, {datetime.date.today().isoformat()}, {here}, {os.cpu_count()} cores"
        done[script, *options] = f"{told}\n\n{last}\n"
        # By the kind of processor, so that a run on another kind moves nothing.
        each = (sorted(([done[command]] if command in done else []) + elsewhere[command], key=machine) for command in SECTIONS)
        page = [head(), *chain.from_iterable(each), *others]
        temporary = output.with_suffix(".tmp")
        temporary.write_text("\n".join(page), encoding="utf-8")
        temporary.replace(output)
    if told := summary(outputs):
        print(told)
    return failed


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="run.py [--peers | --studies] [--pairs FILE] [--output FILE] [--list] [SCRIPT ... | SCRIPT OPTIONS]",
    )
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="SCRIPT", help="path in benchmarks/; SCRIPT --help: its options"
    )
    parser.add_argument("--list", action="store_true", help="print the scripts and what they measure")
    parser.add_argument("--peers", action="store_true", help="run the comparisons with other libraries, with fewer rounds")
    parser.add_argument("--studies", action="store_true", help="run the studies, which takes hours")
    parser.add_argument("--pairs", metavar="FILE", help=f"for {', '.join(OF_PAIRS)}: JSONL with prompt, chosen and rejected")
    parser.add_argument("--output", type=Path, metavar="FILE", default=HERE / "RESULTS.md", help="default: RESULTS.md here")
    arguments = parser.parse_args()
    if arguments.list:
        print(listing())
        return
    options: list[str] = next((arguments.words[i:] for i, word in enumerate(arguments.words) if word.startswith("-")), [])
    # The shell may have completed the whole path.
    scripts = [word.removeprefix("benchmarks/") for word in arguments.words[: len(arguments.words) - len(options)]]
    if unknown := set(scripts) - {script for script, *_ in SECTIONS}:
        parser.error(f"no such script: {', '.join(sorted(unknown))}\n{listing()}")
    if options:
        if len(scripts) != 1:
            parser.error(f"{shlex.join(options)}: options of a script follow the name of that one script")
        sys.exit(start(scripts[0], *options, *pairs_options(scripts[0], arguments.pairs)).returncode)
    named = [section for section in SECTIONS if section[0] in scripts] or list(STUDIES if arguments.studies else TIMED)
    todo: dict[tuple[str, ...], tuple[str, ...]] = {section: () for section in named}
    if arguments.peers and not scripts:
        todo = PEERS
    if failed := record(todo, arguments.pairs, arguments.output):
        sys.exit(f"failed: {', '.join(failed)}; see the messages above")


if __name__ == "__main__":
    main()
