"""Self-play on worked arithmetic (configs/spin/arithmetic.yaml) against the same number of SFT steps on the same rows.

Both start from the model of configs/sft/arithmetic.yaml, whose demonstrations forget borrows. Both continue with the same 2,000
correct demonstrations, the same optimizer and the same batch size. All steps run through the entry point of the command line.
The validation problems are solved after each epoch, the test problems at the end. Results go to a JSON file. Results that are
already there are not computed again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import common

STEPS = 376
TITLES = {
    "sft": "SFT on demonstrations with errors",
    "further": f"  + {STEPS} steps of SFT on correct ones",
    "spin": "  + SPIN, as configured (with an SFT term)",
    "spin_alone": "  + SPIN without the SFT term",
}


def config(name: str) -> tuple[str, str]:
    """Arguments for a configuration."""
    return "--config", str(common.CONFIGS / f"{name}.yaml")


class Seed:
    """One seed's runs."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder / f"seed_{seed}"
        self.rows = ("--data.init_args.cache_dir", str(folder / "cache"), "--data.init_args.train.init_args.seed")

    def fit(self, name: str, *arguments: str) -> Path:
        """Train or resume, and return the checkpoint."""
        from lightning_align.cli import run

        last = self.folder / name / "run" / "checkpoints" / "last.ckpt"
        done = self.folder / f"{name}.done"
        if not done.exists() and not (name == "sft" and last.exists()):
            logger = "--trainer.logger.init_args."
            resume = ["--ckpt_path", str(last)] if last.exists() else []
            where = (f"{logger}save_dir={self.folder}", f"{logger}name={name}", f"{logger}version=run")
            quiet = ("--trainer.enable_progress_bar", "false")
            run(["fit", *arguments, "--seed_everything", str(self.seed), *where, *quiet, *resume])
            done.touch()
        return last

    def test(self, checkpoint: Path) -> float:
        """Share of test problems that a policy solves."""
        from lightning_align.cli import run

        begin = ("--model.init_args.init_from", str(checkpoint), "--model.init_args.backbone", "null")
        quiet = ("--trainer.logger", "false", "--trainer.enable_progress_bar", "false")
        cli = run(["test", *config("sft/arithmetic"), *config("sft/arithmetic_test"), *begin, *quiet])
        assert cli is not None
        return float(cli.trainer.callback_metrics["test/solved"])

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Steps, and the share of validation problems solved after them."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / name / "run"))  # type: ignore[no-untyped-call]
        events.Reload()  # type: ignore[no-untyped-call]
        points = events.Scalars("val/solved")  # type: ignore[no-untyped-call]
        return [(point.step + 1, round(point.value, 4)) for point in points]

    def run(self, name: str) -> dict[str, Any]:
        """A row of the table."""
        sft = self.fit("sft", *config("sft/arithmetic"), *self.rows, str(self.seed))
        begin = ("--model.init_args.init_from", str(sft))
        rows = (*self.rows, str(1000 + self.seed))
        if name == "further":
            train = "--data.init_args.train.init_args."
            same = (f"{train}num_rows", "2000", f"{train}forget_borrow", "0", "--data.init_args.batch_size", "32")
            steps = (
                "--model.init_args.lr_scheduler",
                "null",
                "--trainer.max_steps",
                str(STEPS),
                "--trainer.val_check_interval",
                "63",
            )
            further = (*config("sft/arithmetic"), *config("sft/arithmetic_further"))
            arguments = (*further, *same, *steps)
        else:
            alone = ("--model.init_args.sft_weight", "0") if name == "spin_alone" else ()
            arguments = (*config("spin/arithmetic"), *alone)
        checkpoint = sft if name == "sft" else self.fit(name, *arguments, *begin, *rows)
        return {"test": self.test(checkpoint), "validation": self.curve(name)}


def report(seeds: dict[str, Any]) -> None:
    """Print the section."""
    common.heading(
        "Self-play on worked arithmetic",
        "Share of 1,000 held-out problems solved with greedy decoding. Self-play and SFT start from the same model and "
        f"continue with the same 2,000 demonstrations for {STEPS} steps of 32. Seeds {', '.join(seeds)}.",
    )
    rows = []
    for name, title in TITLES.items():
        found = [seed[name]["test"] for seed in seeds.values() if name in seed]
        if found:
            each = ", ".join(f"{100 * value:.1f}" for value in found)
            rows.append({"policy": title.strip(), "solved, mean": f"{statistics.mean(found):.1%}", "by seed": each})
    print(common.table(rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/spin_arithmetic_study"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]  # the commands take their own arguments
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"seeds": {}}
    for number in arguments.seeds:
        done, seed = results["seeds"].setdefault(str(number), {}), Seed(number, arguments.folder.resolve())
        for name in TITLES:
            if name not in done:
                done[name] = seed.run(name)
                common.save(arguments.output, results)
    report(results["seeds"])


if __name__ == "__main__":
    main()
