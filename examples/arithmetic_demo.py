"""The whole workflow on a CPU: fine-tune, sample, judge, align, and compare on held-out problems.

A tiny PaLM learns worked arithmetic from demonstrations in which three out of four borrows are forgotten. It then samples two
answers to each of many new problems. A checker decides which answer is correct, and DPO learns from the pairs. Every step calls
the entry point of the command line with the configurations in ``configs/``, and prints the command.

Two baselines train for the same number of steps as DPO. The first continues with the same demonstrations. The second, a fair
baseline that beats DPO here, fine-tunes on the correct answers of the same pairs. Settings were chosen on the validation
problems. The table shows the test problems, which are used for nothing else.

    python examples/arithmetic_demo.py                  # one seed, with the output of each command
    python examples/arithmetic_demo.py --seeds 0 1 2    # in parallel on the available cores; output goes to log files
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "sft": "SFT on the sloppy demonstrations",
    "further": "  + the same number of further SFT steps",
    "winners": "  + the same number of SFT steps on correct answers",
    "dpo": "  + DPO",
}
NUM_HELD_OUT = 200


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Redirect the output of the process to a file, including the output of native code."""
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])


def hold_out(pairs: Path, number: int) -> tuple[str, ...]:
    """Split a file of pairs into a training and a validation file next to it. Return the arguments that name them."""
    from lightning_align.runtime.files import publish

    rows = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    words: list[str] = []
    for name, part in (("train", rows[number:]), ("validation", rows[:number])):
        path = pairs.with_name(f"preferences_{name}.jsonl")
        publish(path, partial(Path.write_text, data="".join(part), encoding="utf-8"))
        words += [f"--data.init_args.{name}", str(path)]
    return tuple(words)


class Seed:
    """The run of one seed, in its own folder. A step that already has a result is skipped."""

    def __init__(self, seed: int, folder: Path, *, configs: Path, alone: bool) -> None:
        """Create the folder.

        Args:
            seed: The seed of weights, rows and samples.
            folder: The folder of the demo.
            configs: The folder of the configurations.
            alone: Whether no other seed runs at the same time. If another one does, the output of the commands goes to a file.
        """
        self.seed, self.folder, self.alone = seed, folder / f"seed_{seed}", alone
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        self.sft, self.dpo, self.further, self.test = (
            ("--config", str(configs / f"{name}.yaml"))
            for name in ("sft/arithmetic", "dpo/arithmetic", "sft/arithmetic_further", "sft/arithmetic_test")
        )

    def command(self, step: str, *words: str) -> Any:
        """Run a command of `lightning-align` in this process, unless it was already run, and return its metrics."""
        from lightning_align.cli import run

        done = self.folder / f"{step}.json"
        if done.exists():
            return json.loads(done.read_text())
        if not self.alone:
            print(f"[seed {self.seed}] {step:<16} lightning-align {shlex.join(words[:3])} ...", flush=True)
        start = time.perf_counter()
        with contextlib.nullcontext() if self.alone else output_to(self.log):
            print(f"\n$ lightning-align {shlex.join(words)}", flush=True)
            cli = run(words)
        seconds = time.perf_counter() - start
        result = {} if cli is None else {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        result["seconds"] = seconds
        shown = "".join(f", {name} {result[name]:.3f}" for name in ("val/solved", "test/solved") if name in result)
        print(f"[seed {self.seed}] {step:<16} done in {seconds:.0f} s{shown}", flush=True)
        temporary = done.with_suffix(".tmp")
        temporary.write_text(json.dumps(result))
        os.replace(temporary, done)
        return result

    def fit(self, step: str, *arguments: str) -> Path:
        """Train a step and return its checkpoint. A training that was stopped resumes."""
        last = self.folder / step / "run" / "checkpoints" / "last.ckpt"
        resume = ["--ckpt_path", str(last)] if last.exists() else []
        logger = "--trainer.logger.init_args."
        self.command(
            f"fit_{step}",
            *("fit", *arguments, "--seed_everything", str(self.seed), *self._bar),
            *(f"{logger}save_dir={self.folder}", f"{logger}name={step}", f"{logger}version=run", *resume),
        )
        return last

    @property
    def _bar(self) -> tuple[str, str]:
        return "--trainer.enable_progress_bar", str(self.alone).lower()

    def run(self) -> None:
        """Run all steps."""
        train = "--data.init_args.train"
        rows = (f"{train}.init_args.seed", str(self.seed))
        sft = self.fit("sft", *self.sft, *rows)
        samples, preferences, winners = (str(self.folder / f"{n}.jsonl") for n in ("samples", "preferences", "winners"))
        quiet = ("--trainer.logger", "false", *self._bar)
        self.command(
            "sample",
            *("predict", *self.sft, "--ckpt_path", str(sft), "--output", samples, *quiet),
            *("--data.init_args.predict.init_args.seed", str(1000 + self.seed)),
            *("--trainer.default_root_dir", str(self.folder / "sample")),
        )
        task = ("--task", "Arithmetic")
        self.command("judge", "judge", *task, *("--samples", samples, "--preferences", preferences, "--winners", winners))
        held_out = hold_out(Path(preferences), NUM_HELD_OUT)
        begin = ("--model.init_args.init_from", str(sft))
        policies = {
            "sft": sft,
            "further": self.fit("further", *self.sft, *self.further, *begin, *rows),
            "winners": self.fit("winners", *self.sft, *self.further, *begin, train, winners),
            "dpo": self.fit("dpo", *self.dpo, *begin, *held_out),
        }
        for name, checkpoint in policies.items():
            root = ("--trainer.default_root_dir", str(self.folder / "test" / name))
            self.command(
                f"test_{name}",
                *("test", *self.sft, *self.test),
                *("--model.init_args.init_from", str(checkpoint), "--model.init_args.backbone", "null"),
                *(*quiet, *root),
            )


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the seeds; each is one run")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="the output folder")
    parser.add_argument("--configs", type=Path, default=ROOT / "configs", help="the folder of the configurations")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the seeds in parallel, then print the table."""
    options = arguments()
    if options.worker is not None:
        sys.argv = sys.argv[:1]  # the commands parse their own arguments
        Seed(options.worker, options.folder, configs=options.configs, alone=options.alone).run()
        return
    start = time.perf_counter()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(options.seeds), cores)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // workers))}
    waiting, running = list(options.seeds), {}
    print(f"Running seeds {options.seeds}, {workers} at a time. Output folder: {options.folder}/")
    while waiting or running:
        while waiting and len(running) < workers:
            seed = waiting.pop(0)
            command = [sys.executable, __file__, "--worker", str(seed), "--folder", str(options.folder)]
            command += ["--configs", str(options.configs)]
            command += ["--alone"] if len(options.seeds) == 1 else []
            running[seed] = subprocess.Popen(command, env=environment)
        time.sleep(0.2)
        for seed, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[seed]
            if process.returncode:
                for other in running.values():
                    other.terminate()
                where = "the output above" if len(options.seeds) == 1 else f"{options.folder}/seed_{seed}/log.txt"
                sys.exit(f"Seed {seed} failed with exit status {process.returncode}. See {where}.")
    table(options.seeds, options.folder)
    print(f"\nTotal time: {time.perf_counter() - start:.0f} s. To see curves, samples and histograms, run")
    print(f"  .venv/bin/tensorboard --logdir {options.folder}    and open http://localhost:6006")


def table(seeds: list[int], folder: Path) -> None:
    """Print the share of test problems that each policy solves."""
    solved = {
        row: [json.loads((folder / f"seed_{s}" / f"test_{row}.json").read_text())["test/solved"] for s in seeds] for row in ROWS
    }
    means = {row: statistics.mean(values) for row, values in solved.items()}
    print(f"\nHeld-out problems solved (%), {'mean of ' if len(seeds) > 1 else ''}seeds {seeds}")
    for row, title in ROWS.items():
        each = "  ".join(f"{100 * value:5.1f}" for value in solved[row])
        print(f"  {title:<54}{100 * means[row]:5.1f}   [{each} ]")
    print(f"DPO is {100 * (means['dpo'] - means['sft']):+.1f} points compared with SFT and ", end="")
    print(f"{100 * (means['dpo'] - means['further']):+.1f} compared with the further SFT steps.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped. Run the same command again to resume.")
