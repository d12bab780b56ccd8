"""Run the measurements on a GPU, in the order of what matters most, within a time.

python benchmarks/gpu/run.py --output FOLDER              all of them
python benchmarks/gpu/run.py --output FOLDER dpo waits    some
python benchmarks/gpu/run.py --dry-run                    all with tiny sizes on the CPU; the numbers mean nothing
python benchmarks/gpu/run.py --publish FOLDER             write the results of a folder to benchmarks/RESULTS.md
python benchmarks/gpu/run.py --list                       what there is

Each script runs in its own process and writes its results after each row. One that fails or runs too long is stopped, and the
next one starts.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = HERE.parent / "RESULTS.md"
MARKER = "`python benchmarks/gpu/run.py"


class Script(NamedTuple):
    """A script and the seconds that it may take."""

    name: str
    seconds: int


ORDER = (
    Script("waits", 240),
    Script("attention", 200),
    Script("dpo", 470),
    Script("logprobs", 200),
    Script("decoding", 450),
    Script("loader", 300),
    Script("retrieval", 300),
    Script("faiss_gpu", 240),
    Script("precision", 300),
    Script("largest", 420),
)
DRY_FACTOR = 10
"""A dry run may take this many times as long."""
GRACE = 20
"""Seconds after its time that a script may take to end."""


def there() -> list[Script]:
    """The scripts that exist."""
    return [script for script in ORDER if (HERE / f"{script.name}.py").exists()]


def markdown(results: dict[str, object]) -> str:
    """The section of a file of results."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.common.gpu import markdown as section

    return section(results)


def report(folder: Path) -> str:
    """The sections of all results in a folder, in order."""
    parts = []
    for script in ORDER:
        path = folder / f"{script.name}.json"
        if path.exists():
            results = json.loads(path.read_text(encoding="utf-8"))
            if {"title", "machine", "tables", "failed"} <= results.keys():
                line = f"{MARKER} {script.name}`, {results['date']}"
                parts.append(f"{markdown(results).rstrip()}\n\n{line}\n")
    return "\n".join(parts)


def run(script: Script, folder: Path, *, dry: bool, left: float) -> str:
    """Run a script, and say how it ended.

    Args:
        script: The script.
        folder: Folder of the results and of what it printed.
        dry: Whether to use tiny sizes on the CPU.
        left: Seconds until all should be done.
    """
    # A dry run on a busy processor takes longer than a GPU.
    seconds = min(script.seconds * (DRY_FACTOR if dry else 1), left - GRACE)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ["--output", str(folder), "--seconds", f"{seconds:.0f}", *(["--dry-run"] if dry else [])]
    # Segments that grow avoid fragments where the widths of batches change.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    with (
        open(folder / f"{script.name}.log", "w", encoding="utf-8") as log,
        open(folder / f"{script.name}.out", "w", encoding="utf-8") as out,
    ):
        try:
            ended = subprocess.run(
                [sys.executable, str(HERE / f"{script.name}.py"), *options],
                check=False,
                stdout=out,
                stderr=log,
                env=environment,
                cwd=folder,
                timeout=seconds + GRACE,
            )
        except subprocess.TimeoutExpired:
            return "stopped, its time was up"
    return "complete" if ended.returncode == 0 else f"exit status {ended.returncode}; see {script.name}.log"


def publish(folder: Path) -> None:
    """Replace the sections of the GPU in RESULTS.md. Dry runs are refused."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.run import sections

    for path in folder.glob("*.json"):
        if json.loads(path.read_text(encoding="utf-8")).get("dry_run"):
            sys.exit(f"{path} is of a dry run, whose numbers mean nothing")
    new = sections("\n" + report(folder))
    page = PAGE.read_text(encoding="utf-8")
    replaced = {line.split("`")[1] for line in new}
    kept = {line: text for line, text in sections(page).items() if line.split("`")[1] not in replaced}
    head = page[: page.find("\n## ") + 1]
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text("\n".join([head, *kept.values(), *new.values()]), encoding="utf-8")
    temporary.replace(PAGE)


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="names of scripts; default: all")
    parser.add_argument("--list", action="store_true", help="print the scripts, the time of each, and what they measure")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; the numbers mean nothing")
    parser.add_argument("--minutes", type=float, default=30.0, help="time for all; the last scripts are left out")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=Path("gpu_results"), help="folder of the results")
    parser.add_argument("--publish", type=Path, metavar="FOLDER", help="write the results of a folder to RESULTS.md")
    arguments = parser.parse_args()
    if arguments.list:
        for script in there():
            about = ast.get_docstring(ast.parse((HERE / f"{script.name}.py").read_text(encoding="utf-8"))) or ""
            print(f"  {script.name:<12} {script.seconds:>4} s  {about.splitlines()[0]}")
        return
    if arguments.publish is not None:
        publish(arguments.publish)
        return
    names = [name.removesuffix(".py").removeprefix("benchmarks/gpu/") for name in arguments.scripts]
    if unknown := set(names) - {script.name for script in there()}:
        parser.error(f"no such script: {', '.join(sorted(unknown))}; --list names them")
    start, folder = time.monotonic(), arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for script in [script for script in there() if script.name in names or not names]:
        left = 60 * arguments.minutes - (time.monotonic() - start)
        if left < 60 + GRACE:
            said = "not run, the time was up"
        else:
            print(f"[{time.monotonic() - start:.0f} s] {script.name} ...", flush=True)
            said = run(script, folder, dry=arguments.dry_run, left=left)
        print(f"[{time.monotonic() - start:.0f} s] {script.name}: {said}", flush=True)
        if said != "complete":
            failed.append(script.name)
        (folder / "report.md").write_text(report(folder), encoding="utf-8")
    print("\n" + report(folder))
    if failed:
        sys.exit(f"not complete: {', '.join(failed)}; their results so far are in {folder}")


if __name__ == "__main__":
    main()
