"""Self-play on worked arithmetic, as configs/spin/arithmetic.yaml has it, against as many steps of SFT on the same rows.

Both begin from the model of configs/sft/arithmetic.yaml, whose author forgets borrows, and go on with the same 2,000 careful
demonstrations, with the same optimizer, as many of them a step. All steps run through the command line's own entry point. The
validation problems are solved after each epoch, the test problems at the end. Results go to a JSON file; what is there is not
run again.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import _common as common

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
STEPS = 376
TITLES = {
    "sft": "SFT on careless demonstrations",
    "further": f"  + {STEPS} steps of SFT on careful ones",
    "spin": "  + SPIN, as configured (with an SFT term)",
    "spin_alone": "  + SPIN without the SFT term",
}


def config(name: str) -> tuple[str, str]:
    """Arguments that name a configuration."""
    return "--config", str(CONFIGS / f"{name}.yaml")


class Seed:
    """One seed's runs."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder / f"seed_{seed}"
        self.rows = ("--data.init_args.cache_dir", str(folder / "cache"), "--data.init_args.train.init_args.seed")

    def fit(self, name: str, *arguments: str) -> Path:
        """Train, or go on training, and return the checkpoint."""
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
        """Share of the test problems that a policy solves."""
        from lightning_align.cli import run

        begin = ("--model.init_args.init_from", str(checkpoint), "--model.init_args.backbone", "null")
        quiet = ("--trainer.logger", "false", "--trainer.enable_progress_bar", "false")
        cli = run(["test", *config("sft/arithmetic"), *config("sft/arithmetic_test"), *begin, *quiet])
        assert cli is not None
        return float(cli.trainer.callback_metrics["test/solved"])

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Steps, and the share of the validation problems solved there."""
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
        "Share of 1,000 held-out problems solved, greedily. Self-play and plain fine-tuning begin from the "
        f"same model and go on with the same 2,000 demonstrations, {STEPS} steps of 32 each. Seeds {', '.join(seeds)}.",
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
                temporary = arguments.output.with_suffix(".tmp")
                temporary.write_text(json.dumps(results, indent=1) + "\n")
                os.replace(temporary, arguments.output)
    report(results["seeds"])


if __name__ == "__main__":
    main()
