"""Self-play on your own rows against the same number of SFT steps on them.

For each seed a small PaLM is fine-tuned on all rows. Two arms start from it: two iterations of self-play on the first 500 rows
(configs/spin/jsonl.yaml with one epoch each), and SFT on the same 500 rows for the same number of steps. All steps run through
the entry point of the command line. Results go to a JSON file. Results that are already there are not computed again.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import common

SFT_STEPS, PROMPTS, QUESTIONS, BATCH, ITERATIONS = 200, 500, 100, 8, 2
EPOCH = -(-PROMPTS // BATCH)
# The second iteration also uses the responses of the first.
STEPS = EPOCH + 2 * EPOCH
SIZES = {"num_tokens": 4096, "dim": 256, "depth": 4, "heads": 4, "dim_head": 64}
TITLES = {
    "sft": f"SFT, {SFT_STEPS} steps on all rows",
    "further": f"  + {STEPS} steps of SFT on {PROMPTS} rows",
    "spin": f"  + {ITERATIONS} iterations of SPIN on them, {STEPS} steps",
}


def options(arguments: dict[str, object]) -> list[str]:
    """Arguments in the form of the command line."""
    return [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]


def head(source: Path, target: Path, rows: int) -> Path:
    """The first rows of a file."""
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(itertools.islice(lines, rows)), encoding="utf-8")
    return target


class Seed:
    """One seed's runs."""

    def __init__(self, seed: int, folder: Path, files: dict[str, Path], answer: str | None) -> None:
        self.seed, self.folder, self.files, self.answer = seed, folder / f"seed_{seed}", files, answer
        self.rows = {"data.init_args.tokenizer": files["tokenizer"], "data.init_args.validation": files["questions"]}

    def fit(self, name: str, config: str, arguments: dict[str, object]) -> Path:
        """Train or resume, and return the checkpoint."""
        from lightning_align.cli import run

        last, done = self.folder / name / "run" / "checkpoints" / "last.ckpt", self.folder / f"{name}.done"
        if not done.exists():
            logger = "trainer.logger.init_args."
            where = {f"{logger}save_dir": self.folder, f"{logger}name": name, f"{logger}version": "run"}
            rest = {"seed_everything": self.seed, "trainer.enable_progress_bar": "false", "data.init_args.batch_size": BATCH}
            resume = {"ckpt_path": last} if last.exists() else {}
            run(["fit", "--config", str(common.CONFIGS / config), *options(self.rows | arguments | where | rest | resume)])
            done.touch()
        return last

    def plain(self, steps: int, rate: float) -> dict[str, object]:
        """Arguments of an SFT run."""
        model = "model.init_args."
        return {
            "trainer.max_steps": steps,
            "trainer.val_check_interval": steps,
            f"{model}optimizer.init_args.lr": rate,
            f"{model}lr_scheduler.init_args.total_steps": steps,
            f"{model}lr_scheduler.init_args.warmup_steps": 20,
        }

    def run(self, name: str, rates: dict[str, float]) -> dict[str, float]:
        """A row of the table."""
        backbone = {"class_path": "lightning_align.PaLM", "init_args": SIZES}
        everything = {"data.init_args.train": self.files["all"], "model.init_args.backbone": json.dumps(backbone)}
        sft = self.fit("sft", "sft/jsonl.yaml", self.plain(SFT_STEPS, 1e-3) | everything)
        start = {"model.init_args.init_from": sft, "data.init_args.train": self.files["some"]}
        if name == "further":
            return self.measure(self.fit("further", "sft/jsonl.yaml", self.plain(STEPS, rates["further"]) | start))
        if name == "spin":
            loop = {"class_path": "SelfPlayGeneration", "init_args": {"iterations": ITERATIONS, "epochs": 1, "replay": 1}}
            keep = {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 20, "save_last": True},
            }
            play = {
                "trainer.callbacks": json.dumps([loop, keep]),
                "model.init_args.optimizer.init_args.lr": rates["spin"],
            }
            return self.measure(self.fit("spin", "spin/jsonl.yaml", play | start))
        return self.measure(sft)

    def measure(self, checkpoint: Path) -> dict[str, float]:
        """The loss on the real responses, and metrics of the greedy responses of the policy."""
        from lightning_align.cli import run

        begin = {
            "model.init_args.init_from": checkpoint,
            "trainer.logger": "false",
            "trainer.default_root_dir": self.folder,
            "trainer.enable_progress_bar": "false",
        }
        config = ["--config", str(common.CONFIGS / "sft/jsonl.yaml")]
        cli = run(["validate", *config, *options(self.rows | begin)])
        assert cli is not None
        found = {"loss": float(cli.trainer.callback_metrics["val/loss"])}
        output = self.folder / "answers.jsonl"
        asked = {"data.init_args.predict": self.files["questions"], "output": output}
        cli = run(["predict", *config, *options(self.rows | begin | asked)])
        assert cli is not None
        said = common.read_rows(output)
        answers = [row["responses"][0] for row in said]
        real = [row["response"] for row in common.read_rows(self.files["questions"])]
        found["ended"] = statistics.mean(row["finished"][0] for row in said)
        found["length"] = statistics.mean(map(len, answers)) / statistics.mean(map(len, real))
        if self.answer:
            pairs = [[re.findall(self.answer, text)[-1:] for text in pair] for pair in zip(answers, real, strict=True)]
            found["answered"] = statistics.mean(bool(mine) for mine, _ in pairs)
            found["right"] = statistics.mean(bool(mine) and mine == theirs for mine, theirs in pairs)
        return found


def report(seeds: dict[str, Any], rates: dict[str, float]) -> None:
    """Print the section."""
    common.heading(
        "Self-play on rows of a file",
        f"PaLM of width {SIZES['dim']} and depth {SIZES['depth']}; batches of {BATCH} rows; learning rates "
        f"{rates['further']:g} (SFT) and {rates['spin']:g} (SPIN). On {QUESTIONS} validation rows: loss of the real responses "
        "in nats per token; shares of greedy responses that end, that name an answer, and that name the right one; their "
        f"length divided by that of the real responses. Seeds {', '.join(seeds)}.",
    )
    rows = []
    for name, title in TITLES.items():
        found = [seed[name] for seed in seeds.values() if name in seed]
        if not found:
            continue
        row = {"policy": title.strip()}
        for key in found[0]:
            form = "{:.1%}" if key in ("ended", "answered", "right") else "{:.3f}"
            each = ", ".join(form.format(one[key]) for one in found)
            row[key] = f"{form.format(statistics.mean(one[key] for one in found))} ({each})"
        rows.append(row)
    print(common.table(rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="JSONL of {prompt, response}; needed unless the output is complete")
    parser.add_argument("--validation", type=Path, help="JSONL of {prompt, response} for validation")
    parser.add_argument("--answer", help="regular expression for the answer in a response; the last match counts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sft-rate", type=float, default=1e-4)
    parser.add_argument("--spin-rate", type=float, default=2e-5)
    parser.add_argument("--folder", type=Path, default=Path("runs/spin_rows"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]  # the commands take their own arguments
    rates = {"further": arguments.sft_rate, "spin": arguments.spin_rate}
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rates": rates, "seeds": {}}
    missing = [(seed, name) for seed in arguments.seeds for name in TITLES if name not in results["seeds"].get(str(seed), {})]
    if missing:
        if arguments.train is None or arguments.validation is None:
            parser.error(f"{arguments.output} lacks {len(missing)} runs, which need --train and --validation")
        from lightning_align.cli import run

        folder = arguments.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.exists():
            run(["tokenizer", str(arguments.train), "--output", str(tokenizer), "--vocab_size", str(SIZES["num_tokens"])])
        files = {
            "all": arguments.train.resolve(),
            "some": head(arguments.train, folder / "some.jsonl", PROMPTS),
            "questions": head(arguments.validation, folder / "questions.jsonl", QUESTIONS),
            "tokenizer": tokenizer,
        }
    for number, name in missing:
        seed = Seed(number, arguments.folder.resolve(), files, arguments.answer)
        results["seeds"].setdefault(str(number), {})[name] = seed.run(name, rates)
        common.save(arguments.output, results)
    report(results["seeds"], results["rates"])


if __name__ == "__main__":
    main()
