"""DPO of a pretrained model with LoRA over a sweep of beta, on pairs of a file: what each run changes on held-out pairs.

Two tasks: right and wrong solutions of word problems as they are in a file of pairs, and solutions of a file of demonstrations
beside the same ones with a changed result of one calculation.

All runs of a seed share one stored reference: the first run scores the rows, and the others read what it stored. Two controls
could refute the result. With chosen and rejected exchanged in half of the pairs at random, no preference can be learned. Small
changes of a model can still rank pairs by how likely they were, so look at margins beside accuracies. And a run that computes
its reference in each step, and the prompt of a pair twice, must have the same losses. All runs go through the entry point of
the command line. Results that are in the JSON file are not computed again.
"""

import argparse
import csv
import json
import random
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.studies.spin.crossing import difference
from benchmarks.studies.spin.pretrained import Row, conversation

RANK, ALPHA, BATCH, QUESTION, LONGEST = 8, 16, 4, 250, 300
BETAS = (0.03, 0.1, 0.3)
ARMS = (*(f"beta {beta:g}" for beta in BETAS), "random labels", "recomputed")
"""The last two have beta 0.1."""
FOUND = {
    "accuracy": ("chosen preferred, by the rewards", "{:.1%}", "val/rewards/accuracies"),
    "margin": ("margin of the rewards", "{:.3f}", "val/rewards/margins"),
    "kl": ("KL to the model before, nats per token", "{:.4f}", "val/kl/reference"),
    "displacement": ("change of log p(chosen), nats per token", "{:+.4f}", "val/logps/chosen_displacement"),
    "loss": ("loss", "{:.4f}", "val/loss"),
}
CALCULATION = re.compile(r"<<([^<>=]*)=(\d+)>>\2")
"""How GSM8K writes a calculation: the formula with its result, and the result again."""


@dataclass(frozen=True)
class Task:
    """Which pairs, how many of them, and the learning rate, which were chosen before the runs."""

    title: str
    pairs: str
    steps: int
    held_out: int
    rate: float
    output: str


TASKS = {
    "solutions": Task("", "pairs of GSM8K", 40, 64, 1e-4, "betas.json"),
    "calculations": Task(
        ", on changed calculations",
        "pairs of a solution of GSM8K and the same with one calculation's result changed by 1 to 9",
        60,
        128,
        2e-4,
        "calculations.json",
    ),
}


def miscalculated(rows: list[Row]) -> list[Row]:
    """Pairs of a response and the same one with a changed result of one calculation, of the rows that have one."""
    draw, pairs = random.Random(0), []
    for row in rows:
        response = row["response"]
        if places := list(CALCULATION.finditer(response)):
            found = draw.choice(places)
            result, gap = int(found[2]), draw.randint(1, 9)
            wrong = result - gap if result >= gap and draw.random() < 0.5 else result + gap
            changed = f"{response[: found.start()]}<<{found[1]}={wrong}>>{wrong}{response[found.end() :]}"
            pairs.append({"prompt": row["prompt"], "chosen": response, "rejected": changed})
    return pairs


def read_pairs(task: str, file: Path) -> list[Row]:
    """The pairs of a task."""
    rows: list[Row] = common.read_rows(file)
    return miscalculated(rows) if task == "calculations" else rows


def is_short(row: Row) -> bool:
    """Whether a pair has few characters."""
    return len(row["prompt"]) <= QUESTION and max(len(row["chosen"]), len(row["rejected"])) <= LONGEST


def exchanged(rows: list[Row], seed: int) -> list[Row]:
    """The pairs with chosen and rejected exchanged in exactly half of them, at random."""
    places = set(random.Random(seed).sample(range(len(rows)), len(rows) // 2))
    other = {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}
    return [{name: row[other[name]] for name in other} if place in places else row for place, row in enumerate(rows)]


class Sweep:
    """The runs of one seed."""

    def __init__(self, seed: int, folder: Path, model: str, steps: int, rate: float) -> None:
        self.seed, self.shared, self.model, self.steps, self.rate = seed, folder, model, steps, rate
        self.folder = folder / f"seed_{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def settings(self, arm: str) -> dict[str, Any]:
        """What an arm adds to the configuration of the package."""
        beta = float(arm.removeprefix("beta ")) if arm.startswith("beta") else 0.1
        plain = arm == "recomputed"
        train = f"random_{self.seed}" if arm == "random labels" else "train"
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": self.rate, "weight_decay": 0.0, "fused": True}}
        schedule = {"class_path": "WarmupDecay", "init_args": {"total_steps": "auto", "warmup_steps": 4, "decay": "linear"}}
        keep = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(self.folder / arm), "every_n_train_steps": 10, "save_last": True},
        }
        return {
            "seed_everything": self.seed,
            "model": {
                "init_args": {
                    "lora": {"rank": RANK, "alpha": ALPHA},
                    "beta": beta,
                    "reference": "frozen" if plain else "stored",
                    "reference_cache": str(self.folder / "reference"),
                    "shared_prefix": False if plain else "auto",
                    "optimizer": optimizer,
                    "lr_scheduler": schedule,
                }
            },
            "data": {"init_args": {"batch_size": BATCH, "train": str(self.shared / f"{train}.jsonl")}},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": self.steps,
                "limit_val_batches": 0,
                "val_check_interval": None,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "callbacks": [keep],
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(self.folder), "name": arm, "version": "log"},
                },
            },
        }

    def measure(self, arm: str) -> dict[str, Any]:
        """Train or resume an arm, and validate it against the model before."""
        from lightning_align.cli import run

        names = ("model.init_args.backbone.init_args.name", "data.init_args.tokenizer")
        model = [word for name in names for word in (f"--{name}", self.model)]
        file, last = self.folder / f"{arm}.json", self.folder / arm / "last.ckpt"
        file.write_text(json.dumps(self.settings(arm)), encoding="utf-8")
        begin, first = time.process_time(), not (self.folder / "reference").exists()
        resume = ["--ckpt_path", str(last)] if last.exists() else []
        run(["fit", "--config", "dpo/huggingface", *model, "--config", str(file), *resume])
        seconds = time.process_time() - begin
        monitor = {"class_path": "PreferenceMonitor", "init_args": {"num_prompts": 16, "max_new_tokens": 48}}
        compared = {
            "model": {"init_args": {"reference": "frozen"}},
            "data": {"init_args": {"validation": str(self.shared / "held_out.jsonl")}},
            "trainer": {"limit_val_batches": 1.0, "logger": False, "callbacks": [monitor]},
        }
        other = self.folder / f"{arm}_validate.json"
        other.write_text(json.dumps(compared), encoding="utf-8")
        words = ["--config", str(file), "--config", str(other), "--ckpt_path", str(last)]
        cli = run(["validate", "--config", "dpo/huggingface", *model, *words])
        assert cli is not None
        metrics = cli.trainer.callback_metrics
        found: dict[str, Any] = {key: float(metrics[name]) for key, (_, _, name) in FOUND.items()}
        with (self.folder / arm / "log" / "metrics.csv").open(encoding="utf-8") as log:
            found["curve"] = [float(row["train/loss"]) for row in csv.DictReader(log) if row["train/loss"]]
        if not resume:
            found["seconds"] = seconds
            found["stores"] = arm != "recomputed" and first
        shutil.rmtree(self.folder / arm)
        return found


def average(values: list[float], form: str) -> str:
    """The mean, and each seed where there are several."""
    each = f" ({', '.join(map(form.format, values))})" if len(values) > 1 else ""
    return f"{form.format(statistics.mean(values))}{each}"


def report(task: Task, results: dict[str, Any]) -> None:
    """Print the section."""
    sizes, seeds = results["sizes"], results["seeds"]
    common.heading(
        f"DPO of SmolLM2-135M-Instruct over beta{task.title}",
        f"LoRA of rank {RANK}, {sizes['steps']} steps of {BATCH} {task.pairs}; learning rate {task.rate:g}, stored reference, "
        f"prompts shared, float32, 1 thread. Prompts of training have up to {QUESTION} characters, and responses {LONGEST}. On "
        f"{sizes['held_out']} held-out pairs of any length, against the model before; the KL is estimated on 16 continuations "
        f"of 48 tokens. Seeds {', '.join(seeds)}.",
    )
    rows = []
    for arm in ARMS:
        found = [seed[arm] for seed in seeds.values() if arm in seed]
        if found:
            row = {"run": arm if arm.startswith("beta") else f"beta 0.1, {arm}", "seeds": str(len(found))}
            row |= {title: average([one[key] for one in found], form) for key, (title, form, _) in FOUND.items()}
            took = [one["seconds"] for one in found if "seconds" in one and not one["stores"]]
            rows.append({**row, "CPU s of training": f"{statistics.mean(took):.0f}" if took else ""})
    print(common.table(rows))
    claims = []
    # A model that has not changed has rewards of 0, and prefers neither response.
    compared = {number: {**seed, "before": {"accuracy": 0.5}} for number, seed in seeds.items() if "beta 0.1" in seed}
    mean, half = (100 * value for value in difference(compared, "beta 0.1", "before", "accuracy"))
    interval = f" ({mean - half:+.1f} to {mean + half:+.1f})" if len(compared) > 1 else ""
    claims.append(
        common.claim(
            "accuracy at beta 0.1, above the 50 % of a model that has not changed",
            "≥ 15 points",
            f"{mean:+.1f}{interval}",
            mean >= 15,
        )
    )
    both = {number: seed for number, seed in seeds.items() if {"beta 0.1", "random labels"} <= seed.keys()}
    for key, form, factor in (("accuracy", "{:+.1f}", 100), ("margin", "{:+.3f}", 1)) if both else ():
        mean, half = (factor * value for value in difference(both, "beta 0.1", "random labels", key))
        low = mean - half if len(both) > 1 else mean
        interval = f" ({form.format(low)} to {form.format(mean + half)})" if len(both) > 1 else ""
        claims.append(common.claim(f"{key} minus that with random labels", "> 0", form.format(mean) + interval, low > 0))
    for number, seed in seeds.items():
        if {"beta 0.1", "recomputed"} <= seed.keys():
            gap = max(abs(a - b) for a, b in zip(seed["beta 0.1"]["curve"], seed["recomputed"]["curve"], strict=True))
            what = f"seed {number}: gap of the losses of all steps, stored and shared to recomputed and separate"
            claims.append(common.claim(what, "≤ 1e-3", f"{gap:.1e}", gap <= 1e-3))
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of transformers; needed unless the output is complete")
    parser.add_argument("--task", choices=TASKS, default="solutions")
    rows = "{prompt, chosen, rejected}, or {prompt, response} for calculations"
    parser.add_argument("--train", type=Path, help=f"JSONL of {rows}")
    parser.add_argument("--validation", type=Path, help=f"JSONL of {rows}")
    parser.add_argument("--steps", type=int, help="default: those of the task")
    parser.add_argument("--held-out", type=int, help="validation pairs; default: those of the task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folder", type=Path, default=Path("runs/dpo_betas"))
    parser.add_argument("--output", type=Path, help="default: a file beside this one for each task")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    steps, number_held_out = arguments.steps or task.steps, arguments.held_out or task.held_out
    output: Path = arguments.output or Path(__file__).with_name(task.output)
    sys.argv = sys.argv[:1]  # the commands take their own arguments

    def stored() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"seeds": {}}
        return found

    done = stored()["seeds"]
    missing = [(seed, arm) for seed in arguments.seeds for arm in arguments.arms if arm not in done.get(str(seed), {})]
    if missing:
        if None in (arguments.model, arguments.train, arguments.validation):
            parser.error(f"{output} lacks {len(missing)} runs, which need --model, --train and --validation")
        folder = arguments.folder.resolve() / arguments.task
        folder.mkdir(parents=True, exist_ok=True)
        train = [row for row in read_pairs(arguments.task, arguments.train) if is_short(row)][: steps * BATCH]
        held_out = read_pairs(arguments.task, arguments.validation)[:number_held_out]
        mixed = {f"random_{seed}": exchanged(train, seed) for seed in arguments.seeds}
        for name, rows in {"train": train, **mixed, "held_out": held_out}.items():
            lines = (json.dumps(conversation(row)) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        sizes = {"steps": steps, "train": len(train), "held_out": len(held_out)}
    for number, arm in missing:
        found = Sweep(number, folder, str(Path(arguments.model).resolve()), steps, task.rate).measure(arm)
        results = stored()  # another process may have added seeds
        results["sizes"] = sizes
        results["seeds"].setdefault(str(number), {})[arm] = found
        common.save(output, results)
    report(task, stored())


if __name__ == "__main__":
    main()
