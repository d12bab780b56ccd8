"""Self-play of a pretrained model against the same number of SFT steps, and against DPO on given pairs, with LoRA.

As in the SPIN paper, the model is first fine-tuned on the demonstrations that self-play then uses. Three arms start from it and
take the same number of steps of the same batch size: more SFT on the same rows, three iterations of self-play on them, and DPO
on pairs of a file. All steps run through the entry point of the command line. Results go to a JSON file. Results that are
already there are not computed again.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.studies.spin.crossing import difference

BATCH, EPOCHS, ITERATIONS, SAMPLES, LONGEST, QUESTION = 8, 3, 3, 8, 200, 160
RATES = {"start": 2e-4, "sft": 1e-4, "spin": 5e-5, "dpo": 5e-5}
TITLES = {
    "before": "the model as it is",
    "start": "SFT, {start} steps",
    "sft": "+ {steps} steps of SFT on the same rows",
    "spin": "+ {iterations} iterations of SPIN on them, {steps} steps",
    "dpo": "+ {steps} steps of DPO on {pairs} given pairs",
}
ANSWER = re.compile(r"(?:####|A:)\s*([-+]?[\d,.]+)")
Row = dict[str, str]


def short(rows: list[Row], responses: tuple[str, ...]) -> list[Row]:
    """The rows whose prompt and responses have few characters."""
    return [row for row in rows if len(row["prompt"]) <= QUESTION and all(len(row[name]) <= LONGEST for name in responses)]


def conversation(row: Row) -> dict[str, Any]:
    """A row as turns of a chat."""
    role = {"prompt": "user"}
    return {name: [{"role": role.get(name, "assistant"), "content": text.strip()}] for name, text in row.items()}


def write(file: Path, rows: list[Row]) -> None:
    """Write rows as chats."""
    file.write_text("".join(json.dumps(conversation(row)) + "\n" for row in rows), encoding="utf-8")


def answer(text: str) -> str | None:
    """The last number that a response names as its answer."""
    found = ANSWER.findall(text)
    return found[-1].rstrip(".").replace(",", "").removesuffix(".0") if found else None


class Seed:
    """One seed's runs."""

    def __init__(self, seed: int, folder: Path, kind: str, model: str, sizes: Mapping[str, int]) -> None:
        self.seed, self.shared, self.model, self.sizes = seed, folder, model, sizes
        self.folder = folder / f"seed_{seed}{kind}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def words(self, command: str, config: str, model: str) -> list[str]:
        """A command line up to its rows."""
        begin = [command, "--config", str(common.CONFIGS / config / "huggingface.yaml"), "--seed_everything", str(self.seed)]
        names = ("model.init_args.backbone.init_args.name", "data.init_args.tokenizer")
        begin += [word for name in names for word in (f"--{name}", model if "model" in name else self.model)]
        return [*begin, "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]

    def fit(self, name: str, method: str, start: str, steps: int, callbacks: list[dict[str, Any]]) -> str:
        """Train or resume, and return the folder of the exported model."""
        from lightning_align.cli import run

        output, place = self.folder / name, self.folder / "runs" / name
        if (output / "config.json").exists():
            return str(output)
        keep = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(place), "every_n_train_steps": 8, "save_last": True},
        }
        export = {"class_path": "ExportModel", "init_args": {"folder": str(output)}}
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": RATES[name], "weight_decay": 0.0, "fused": True}}
        schedule = {"class_path": "WarmupDecay", "init_args": {"total_steps": "auto", "warmup_steps": 4, "decay": "linear"}}
        settings: dict[str, Any] = {
            "model": {"init_args": {"lora": {"rank": 16, "alpha": 32}, "optimizer": optimizer}},
            "data": {"init_args": {"batch_size": BATCH, "train": str(self.shared / f"{method}.jsonl")}},
            "trainer": {
                "limit_val_batches": 0,
                "log_every_n_steps": 1,
                "callbacks": [*callbacks, keep, export],
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(self.folder / "runs"), "name": name, "version": "log"},
                },
            },
        }
        if method != "spin":
            settings["trainer"] |= {"max_steps": steps, "max_epochs": -1}
            settings["model"]["init_args"]["lr_scheduler"] = schedule
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        resume = ["--ckpt_path", str(place / "last.ckpt")] if (place / "last.ckpt").exists() else []
        run([*self.words("fit", method, start), "--config", str(file), *resume])
        return str(output)

    def arm(self, name: str) -> str:
        """The model of an arm."""
        if name == "before":
            return self.model
        steps = self.sizes["start" if name == "start" else "steps"]
        start = self.model if name == "start" else self.fit("start", "sft", self.model, self.sizes["start"], [])
        loop = {
            "class_path": "SelfPlayGeneration",
            "init_args": {"iterations": ITERATIONS, "epochs": 1, "replay": 0, "folder": str(self.folder / "generations")},
        }
        method = "sft" if name == "start" else name
        return self.fit(name, method, start, steps, [loop] if name == "spin" else [])

    def measure(self, name: str, model: str) -> dict[str, float]:
        """The loss of the held-out responses, and what the model answers, once greedily and several times at random."""
        from lightning_align.cli import run

        held_out = str(self.shared / "held_out.jsonl")
        quiet = ["--trainer.logger", "false", "--trainer.callbacks", "null"]
        cli = run([*self.words("validate", "sft", model), "--data.init_args.validation", held_out, *quiet])
        assert cli is not None
        found = {"loss": float(cli.trainer.callback_metrics["val/loss"])}
        if name == "before":
            return found  # it does not know the form of the answers
        real = [row["response"][0]["content"] for row in common.read_rows(Path(held_out))]
        for kind, number, temperature in (("greedy", 1, 0.0), ("sampled", SAMPLES, 0.7)):
            output = self.folder / f"{name}_{kind}.jsonl"
            settings = {"max_new_tokens": 112, "num_samples": number, "temperature": temperature, "batch_size": 48}
            words = [*self.words("predict", "sft", model), "--data.init_args.predict", held_out, *quiet]
            words += [word for key, value in settings.items() for word in (f"--model.init_args.generation.{key}", str(value))]
            if not output.exists():
                run([*words, "--output", str(output)])
            said = common.read_rows(output)
            right = [
                [answer(text) is not None and answer(text) == answer(true) for text in row["responses"]]
                for row, true in zip(said, real, strict=True)
            ]
            found[f"{kind}_solved"] = statistics.mean(map(any, right))
            if kind == "sampled":
                found["solved_per_sample"] = statistics.mean(map(statistics.mean, right))
                found["ended"] = statistics.mean(done for row in said for done in row["finished"])
                texts = [text for row in said for text in row["responses"]]
                found["length"] = statistics.mean(map(len, texts)) / statistics.mean(map(len, real))
                found["named"] = statistics.mean(answer(text) is not None for text in texts)
        return found


COLUMNS = {
    "loss": ("nats per token", "{:.3f}"),
    "greedy_solved": ("solved greedily", "{:.1%}"),
    "solved_per_sample": ("solved per sample", "{:.1%}"),
    "sampled_solved": (f"solved in {SAMPLES} samples", "{:.1%}"),
    "ended": ("ended", "{:.1%}"),
    "named": ("name an answer", "{:.1%}"),
    "length": ("length", "{:.2f}"),
}


def report(results: dict[str, Any]) -> None:
    """Print the section."""
    sizes, seeds = results["sizes"], results["seeds"]
    epochs = sizes["start"] // -(-sizes["rows"] // BATCH)
    common.heading(
        f"Self-play of SmolLM2-135M-Instruct after {epochs} epochs of SFT",
        f"LoRA of rank 16, batches of {BATCH}, {sizes['rows']} demonstrations; learning rates "
        f"{', '.join(f'{rate:g} ({name})' for name, rate in RATES.items())}; beta 0.1. On {sizes['held_out']} held-out "
        "rows: loss of the real responses in nats per token; problems solved greedily, by a sample at temperature 0.7, and by "
        f"at least one of {SAMPLES}; shares of samples that end and that name an answer; their length divided by that of the "
        f"real responses. Seeds {', '.join(seeds)}.",
    )
    filled = {"iterations": ITERATIONS, **sizes}
    rows = []
    for name, title in TITLES.items():
        found = [seed[name] for seed in seeds.values() if name in seed]
        row = {"policy": title.format_map(filled), "seeds": str(len(found))}
        for key, (column, form) in COLUMNS.items():
            values = [one[key] for one in found if key in one]
            each = f" ({', '.join(map(form.format, values))})" if len(values) > 1 else ""
            row[column] = f"{form.format(statistics.mean(values))}{each}" if values else ""
        if found:
            rows.append(row)
    print(common.table(rows))
    rows = []
    for first, second in (("spin", "sft"), ("spin", "start"), ("sft", "start"), ("dpo", "start")):
        row = {"difference": f"{first} minus {second}"}
        for key in ("loss", "solved_per_sample", "length"):
            both = {number: seed for number, seed in seeds.items() if first in seed and second in seed}
            if both:
                mean, half = difference(both, first, second, key)
                interval = f" ({mean - half:+.3f} to {mean + half:+.3f})" if len(both) > 1 else ""
                row[COLUMNS[key][0]] = f"{mean:+.3f}{interval}"
        if len(row) > 1:
            rows.append(row)
    print(common.table(rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of transformers; needed unless the output is complete")
    parser.add_argument("--train", type=Path, help="JSONL of {prompt, response}")
    parser.add_argument("--validation", type=Path, help="JSONL of {prompt, response} for validation")
    parser.add_argument("--pairs", type=Path, help="JSONL of {prompt, chosen, rejected} for the arm of DPO")
    parser.add_argument("--rows", type=int, default=128, help="demonstrations")
    parser.add_argument("--held-out", type=int, default=48, help="validation rows")
    parser.add_argument("--start-epochs", type=int, default=EPOCHS, help="epochs of SFT before the arms; their length stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--folder", type=Path, default=Path("runs/spin_pretrained"))
    parser.add_argument("--output", type=Path, help="default: a file beside this one for each number of epochs")
    arguments = parser.parse_args()
    epochs: int = arguments.start_epochs
    kind = "" if epochs == EPOCHS else f"_{epochs}_epochs"
    output: Path = arguments.output or Path(__file__).with_name(f"pretrained{kind}.json")
    sys.argv = sys.argv[:1]  # the commands take their own arguments

    def stored() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"seeds": {}}
        return found

    done = stored()["seeds"]
    missing = [(seed, name) for seed in arguments.seeds for name in arguments.arms if name not in done.get(str(seed), {})]
    if missing:
        if None in (arguments.model, arguments.train, arguments.validation, arguments.pairs):
            parser.error(f"{output} lacks {len(missing)} runs, which need --model, --train, --validation and --pairs")
        folder = arguments.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = short(common.read_rows(arguments.train), ("response",))[: arguments.rows]
        held_out = short(common.read_rows(arguments.validation), ("response",))[: arguments.held_out]
        pairs = short(common.read_rows(arguments.pairs), ("chosen", "rejected"))[: arguments.rows]
        for name, some in (("sft", rows), ("spin", rows), ("dpo", pairs), ("held_out", held_out)):
            write(folder / f"{name}.jsonl", some)
        epoch = -(-len(rows) // BATCH)
        sizes = {"rows": len(rows), "held_out": len(held_out), "pairs": len(pairs)}
        sizes |= {"start": epochs * epoch, "steps": ITERATIONS * epoch}
    for number, name in missing:
        seed = Seed(number, folder, kind, str(Path(arguments.model).resolve()), sizes)
        found = seed.measure(name, seed.arm(name))
        results = stored()  # another process may have added seeds
        results["sizes"] = sizes
        results["seeds"].setdefault(str(number), {})[name] = found
        common.save(output, results)
    report(stored())


if __name__ == "__main__":
    main()
