"""Self-play and SFT from an early and from an overfitted start, on a Markov chain.

The SPIN paper fine-tunes a model that more SFT makes worse (its Table 3). Here a model is fine-tuned on few demonstrations of a
chain, for few or for many epochs. Every arm then starts from it and takes the same number of steps on the same demonstrations:
SFT with a small and a large learning rate, SPIN, and SPIN with an SFT term. Validity and divergence are those of `markov.py`.
Settings were fixed before the runs, near those that `markov.py` chose on a chain of its own. The small learning rate of SFT is
the control: if self-play won only because it moves less, this arm would win as well. The start itself, which takes no step, is
the other.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.studies.spin import markov

ROWS = 250
STARTS = (120, 20)
"""Epochs of the first fine-tuning."""
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SFT, lr 1e-4": ({"lr": 1e-4}, {}),
    "SFT, lr 1e-3": ({"lr": 1e-3}, {}),
    "SPIN": ({"lr": 3e-4, "beta": 0.5}, markov.LOOP),
    "SPIN, with an SFT term": ({"lr": 1e-3, "beta": 0.1, "sft_weight": 1.0}, markov.LOOP),
}


def compute(seeds: list[int], folder: Path, output: Path) -> dict[str, Any]:
    """Run what is missing. The results are written after each arm."""
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    for epochs in STARTS:
        for seed in seeds:
            done = results.setdefault(f"{epochs} epochs", {}).setdefault(str(seed), {})
            if all(name in done for name in ("start", *ARMS)):
                continue
            place = folder / f"{epochs}"
            study = markov.Seed(seed, place, rows=ROWS, base_epochs=epochs)
            study.ruler = markov.Ruler(seed, "test", num_rows=200, num_samples=500)
            study.folder.mkdir(parents=True, exist_ok=True)
            done.setdefault("start", study.start())
            for name, (settings, loop) in ARMS.items():
                if name not in done:
                    start = time.process_time()
                    done[name] = {**study.run(settings, loop)[-1], "cpu_seconds": time.process_time() - start}
                    common.save(output, results)
    return results


def difference(runs: dict[str, Any], arm: str, base: str, quantity: str) -> tuple[float, float]:
    """The mean over seeds of an arm minus another one, and half the width of its 95 % interval."""
    each = [run[arm][quantity] - run[base][quantity] for run in runs.values()]
    half = common.spread(each)
    return statistics.mean(each), half


def complete(results: dict[str, Any]) -> dict[str, Any]:
    """The seeds that have every arm, by start."""
    found = {}
    for start, runs in results.items():
        found[start] = {seed: run for seed, run in runs.items() if all(name in run for name in ("start", *ARMS))}
    return {start: runs for start, runs in found.items() if runs}


def report(results: dict[str, Any]) -> None:
    """Print the section."""
    common.heading(
        "Self-play and SFT from an early and from an overfitted start, on a Markov chain",
        f"The chain and the model of `markov.py`, {ROWS} demonstrations. SFT for {STARTS[1]} or {STARTS[0]} epochs, then "
        f"{markov.EPOCHS[-1]} epochs of SFT or as many steps of self-play in three iterations. Each seed has its own chain; "
        "mean, and each seed. Validity: share of possible responses among 500, sampled at temperature 1. Divergence: KL(chain "
        "|| model) per response in nats. Differences: mean, with the 95 % interval over seeds (Student's t), also "
        "for the seeds of `markov.py`.",
    )
    rows = []
    for start, runs in results.items():
        for name in ("start", *ARMS):
            cells = {"SFT for": start, "then": "nothing" if name == "start" else name, "seeds": str(len(runs))}
            for quantity, scale, form in (("validity", 100, "{:.1f}"), ("divergence", 1, "{:.2f}")):
                values = [scale * run[name][quantity] for run in runs.values()]
                each = f" ({', '.join(map(form.format, values))})" if len(values) > 1 else ""
                cells[quantity + (", %" if scale == 100 else "")] = form.format(statistics.mean(values)) + each
            cells["length"] = f"{statistics.mean(run[name]['length'] for run in runs.values()):.1f}"
            rows.append(cells)
    print(common.table(rows))
    results = {start: (runs, ("start", "SFT, lr 1e-4", "SFT, lr 1e-3")) for start, runs in results.items()}
    results[f"{markov.BASE_EPOCHS} epochs, {markov.ROWS:,} rows"] = (earlier(), ("start", "continued SFT"))
    rows = []
    for start, (runs, bases) in results.items():
        for arm in ("SPIN", "SPIN, with an SFT term"):
            for base in bases:
                cells = {"SFT for": start, "arm": arm, "minus": base}
                for quantity, scale in (("validity", 100), ("divergence", 1)):
                    mean, half = (scale * value for value in difference(runs, arm, base, quantity))
                    spread = f" ({mean - half:+.2f} to {mean + half:+.2f})" if len(runs) in common.T_95 else ""
                    cells["validity, points" if scale == 100 else quantity] = f"{mean:+.2f}{spread}"
                rows.append(cells)
    print(common.table(rows))


def earlier() -> dict[str, Any]:
    """The last points of the seeds of `markov.py`, whose settings were chosen by validity."""
    seeds = json.loads(Path(markov.__file__).with_suffix(".json").read_text(encoding="utf-8"))["seeds"]
    named = {"start": "base", **{name: name for name in ("continued SFT", "SPIN", "SPIN, with an SFT term")}}
    return {seed: {name: run[arm][-1] for name, arm in named.items()} for seed, run in seeds.items()}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/spin_crossing"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = compute(arguments.seeds, arguments.folder, arguments.output)
    report(complete(results))


if __name__ == "__main__":
    main()
