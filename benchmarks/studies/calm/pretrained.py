"""A pretrained model reads another one that knows a table of made-up words: sums of words that were never composed in training.

The augment is the same model, fine-tuned on the table. The anchor can add numbers but does not know the words. Training
composes some of the words; the questions are sums of others. Each arm is saved when it is done, and one that is saved is
not computed again.
"""

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common.word_sums import AUGMENT_BATCH, BATCH, NUMBER_SHARE, QUESTIONS, VALUES, Row, Rows
from lightning_align import Augment, CALMModule, ConnectionConfig, LoRAConfig, PretrainedLM, SFTDataModule, SFTModule
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.models.lora import merge_lora, remove_lora
from lightning_align.training.schedules import WarmupDecay
from lightning_align.types import TokenBatch

AUGMENT_RATE = 2e-3
AUGMENT_LORA: dict[str, Any] = {"rank": 32, "alpha": 64.0, "targets": ["*.layers.1?.mlp.*"]}
CONNECTIONS = [[30, 2], [30, 6], [30, 10]]  # the last layer of the augment predicts the value where a word ends
CONNECTION: dict[str, Any] = {"heads": 8, "dim_head": 16, "project": False}
CALM_RATE, LORA_RATE, FULL_RATE = 2e-3, 1e-3, 1e-4
LORA_RANK = 3
TITLES = {
    "anchor": "anchor alone",
    "augment": "augment alone",
    "calm": "CALM",
    "vanilla": "CALM, an augment that has not seen the table",
    "lora": "LoRA on the anchor",
    "finetuned": "anchor, all weights fine-tuned",
    "augment_lora": "LoRA on the augment",
}
ARMS = ("calm", "vanilla", "lora", "finetuned", "augment_lora")
HELP = {
    "words": "in the table",
    "held_in": "the share of the words that training composes",
    "one_word": "the share of its rows that add a word and a number",
    "steps": "of an arm",
    "augment_steps": "of the training on the table",
}
SETS = ("held_out", "validation", "held_in", "numbers")


# -- training and measuring


def write(path: Path, rows: list[Row]) -> str:
    """Write rows to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


class Study:
    """The model, the rows, where results go, and how they are computed."""

    def __init__(self, model: str, folder: Path, rows: Rows, precision: Any = "32-true") -> None:
        """Write the questions."""
        self.model, self.folder, self.rows, self.precision = model, folder, rows, precision
        each = rows.questions().items()
        self.questions = {name: self.batches(write(folder / f"{name}.jsonl", questions)) for name, questions in each}
        tokenizer = load_tokenizer(model)
        self.digits = torch.tensor([tokenizer.encode_batch([str(digit)])[0].ids[0] for digit in range(10)])

    def rows_of(self, file: str, size: int, seed: int = 0) -> SFTDataModule:
        """Rows of a file."""
        cache = str(self.folder / "cache")
        options: dict[str, Any] = {"batch_size": size, "eval_batch_size": 128, "max_length": 64, "group_by_length": False}
        return SFTDataModule(file, validation=file, tokenizer=self.model, cache_dir=cache, seed=seed, **options)

    def batches(self, file: str) -> list[TokenBatch]:
        """The rows of a file in their order."""
        data = self.rows_of(file, 128)
        data.prepare_data()
        data.setup("validate")
        loader: Any = data.val_dataloader()
        return list(loader)

    def load(self, folder: Path | None = None) -> PretrainedLM:
        """The model, or a fine-tuned one from a folder."""
        return PretrainedLM(str(folder or self.model), attention="eager")  # the fastest for rows of a dozen tokens

    @torch.no_grad()
    def measure(self, policy: nn.Module, names: tuple[str, ...] = SETS) -> dict[str, dict[str, float]]:
        """The share of right answers and the mean log p of an answer in nats, by set of questions."""
        found = {}
        for name in names:
            pairs = [self.answers(policy, batch) for batch in self.questions[name]]
            right, logps = (torch.cat(values) for values in zip(*pairs, strict=True))
            found[name] = {"right": round(float(right.double().mean()), 4), "logp": round(float(logps.double().mean()), 4)}
        return found

    def answers(self, policy: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Whether greedy decoding writes the right number, and log p of its digits.

        Decoding writes the right digits exactly if each of them is the likeliest token behind those before it. The next token
        must not be another digit, but it need not end the text: a model that was not trained on the rows goes on.
        """
        model: Any = policy
        hidden = model.hidden(batch["tokens"])
        rows, columns = batch["targets"].nonzero(as_tuple=True)
        logits, targets = model.head.logits(hidden[rows, columns - 1]), batch["tokens"][rows, columns]
        is_digit, best = torch.isin(targets, self.digits), logits.argmax(1)
        as_wanted = torch.where(is_digit, best == targets, ~torch.isin(best, self.digits))
        logps = logits.log_softmax(1).gather(1, targets[:, None])[:, 0] * is_digit
        size = len(batch["tokens"])
        wrong = torch.zeros(size).index_add_(0, rows, (~as_wanted).float())
        return wrong == 0, torch.zeros(size).index_add_(0, rows, logps)

    def fit(
        self, module: Any, rows: list[Row], *, steps: int, size: int, seed: int = 0, watched: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Train a module, and return its size, its time and the shares of right answers on the way."""
        module.configure_model()
        data = self.rows_of(write(self.folder / f"rows_{seed}.jsonl", rows), size, seed)
        curve, every = list[Any](), max(1, steps // 2)

        def look(trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step % every == 0:
                right = {name: value["right"] for name, value in self.measure(module.policy, watched).items()}
                loss = round(float(trainer.callback_metrics["train/loss"]), 4)
                curve.append({"step": trainer.global_step, "loss": loss, **right})
                print(curve[-1], file=sys.stderr, flush=True)

        start = time.process_time()
        quiet: dict[str, Any] = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
        quiet |= {"logger": False, "default_root_dir": self.folder, "precision": self.precision}
        limits: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "gradient_clip_val": 1.0}
        callbacks: list[Any] = [L.pytorch.callbacks.LambdaCallback(on_train_batch_end=look)]
        L.Trainer(accelerator="cpu", **limits, **quiet, callbacks=callbacks).fit(module, data)
        trained = sum(parameter.numel() for parameter in module.policy.parameters() if parameter.requires_grad)
        return {"trained": trained, "steps": steps, "curve": curve, "seconds": round(time.process_time() - start)}

    def augment(self) -> dict[str, Any]:
        """Fine-tune the model on the table with adapters, merge them, and save it."""
        L.seed_everything(0)
        lora = LoRAConfig(**AUGMENT_LORA)
        module = SFTModule(self.load(), lora=lora, **schedule(AUGMENT_RATE))
        told = self.fit(module, self.rows.of_table(), steps=self.rows.augment_steps, size=AUGMENT_BATCH, watched=("table",))
        policy: Any = module.policy
        merge_lora(policy, lora.scope)
        remove_lora(policy, lora.scope)
        policy.model.save_pretrained(self.knowing)
        load_tokenizer(self.model).save(self.knowing)  # type: ignore[attr-defined]
        return told

    @property
    def knowing(self) -> Path:
        """The folder of the augment."""
        return self.folder / "augment"

    def alone(self, name: str) -> dict[str, Any]:
        """The anchor or the augment as it is."""
        names = (*SETS, "table")
        return self.measure(self.load(self.knowing if name == "augment" else None), names)

    def arm(self, name: str, seed: int) -> dict[str, Any]:
        """Train an arm on the rows of a seed."""
        L.seed_everything(seed)
        if name in ("calm", "vanilla"):
            augment = Augment(self.load(self.knowing if name == "calm" else None), connections=CONNECTIONS)
            options: Any = {"anchor_position": "input", "connection": ConnectionConfig(**CONNECTION)}
            options["store_states"] = str(self.folder / "states")
            module: Any = CALMModule(self.load(), [augment], **options, **schedule(CALM_RATE))
        elif name == "finetuned":
            module = SFTModule(self.load(), **schedule(FULL_RATE))
        else:
            start = self.load(self.knowing if name == "augment_lora" else None)
            module = SFTModule(start, lora=LoRAConfig(rank=LORA_RANK, alpha=2 * LORA_RANK), **schedule(LORA_RATE))
        told = self.fit(module, self.rows.composed(seed), steps=self.rows.steps, size=BATCH, seed=seed, watched=SETS[1:])
        return {**told, **self.measure(module.policy)}


def schedule(rate: float) -> dict[str, Any]:
    """AdamW and a cosine schedule, as arguments of a module."""
    optimizer = partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return {"optimizer": optimizer, "lr_scheduler": partial(WarmupDecay, warmup_steps=10, decay="cosine", final=0.05)}


def stored(output: Path) -> dict[str, Any]:
    """The results so far."""
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    return found


def setting_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on besides the model."""
    return {name: getattr(arguments, name) for name in (*asdict(Rows()), "precision")}


def compute(arguments: argparse.Namespace) -> None:
    """Compute what is missing."""
    setting = setting_of(arguments)
    found = stored(arguments.output)
    if found.setdefault("setting", setting) != setting:
        sys.exit(f"{arguments.output} has results of {found['setting']}, not of {setting}. Use another --output.")
    common.save(arguments.output, found)
    rows = Rows(**{name: value for name, value in setting.items() if name != "precision"})
    study = Study(str(Path(arguments.model).resolve()), arguments.folder.resolve(), rows, setting["precision"])

    def once(places: list[str], name: str, value: Callable[[], Any]) -> None:
        def place(found: dict[str, Any]) -> dict[str, Any]:
            for each in places:
                found = found.setdefault(each, {})
            return found

        if name not in place(stored(arguments.output)):
            result = value()
            found = stored(arguments.output)  # another process may have written
            place(found)[name] = result
            common.save(arguments.output, found)
            print(f"{name} is done: {result}", file=sys.stderr, flush=True)

    needed = bool({"calm", "augment_lora"} & set(arguments.arms)) or "augment" not in stored(arguments.output).get("alone", {})
    if needed and not (study.knowing / "config.json").exists():
        once([], "training of the augment", study.augment)
        if not (study.knowing / "config.json").exists():
            sys.exit(f"{study.knowing} is gone, and {arguments.output} has results of it. Use another --output.")
    for name in ("anchor", "augment"):
        once(["alone"], name, lambda: study.alone(name))  # noqa: B023
    for seed in arguments.seeds:
        for name in arguments.arms:
            once(["seeds", str(seed)], name, lambda: study.arm(name, seed))  # noqa: B023


# -- the report


def difference(seeds: dict[str, Any], arm: str, base: str, quantity: str) -> tuple[float, float, int]:
    """The mean over the seeds that have both of an arm minus another one on held-out words, half its interval, the seeds."""
    runs = [run for run in seeds.values() if arm in run and base in run]
    each = [run[arm]["held_out"][quantity] - run[base]["held_out"][quantity] for run in runs]
    return statistics.mean(each), common.spread(each), len(each)


def cell(runs: list[dict[str, Any]], name: str, quantity: str) -> str:
    """The mean of a quantity, and that of each seed."""
    scale, form = (100, "{:.1f}") if quantity == "right" else (1, "{:.2f}")
    values = [scale * run[name][quantity] for run in runs]
    return form.format(statistics.mean(values)) + (f" ({', '.join(map(form.format, values))})" if len(values) > 1 else "")


def report(found: dict[str, Any]) -> None:
    """Print the section."""
    alone, seeds = found["alone"], found["seeds"]
    setting = dict(found["setting"])
    precision, study_rows = setting.pop("precision"), Rows(**setting)
    sizes = {name: len(words) for name, words in study_rows.parts.items()}
    mixed = f", {study_rows.one_word:.0%} of a word and a number" if study_rows.one_word else ""
    answers = [one["response"] for one in study_rows.questions()["held_out"]]
    (often, times), *_ = Counter(answers).most_common(1)
    common.heading(
        f"CALM on SmolLM2-135M-Instruct: sums of words of a table, {sizes['held_in']} of {study_rows.words:,} composed",
        f"{study_rows.words:,} made-up words with values {VALUES[0]} to {VALUES[-1]}. The augment is the model fine-tuned on "
        f"all of them, once for all seeds: it knows {100 * alone['augment']['table']['right']:.1f} %, and the anchor "
        f"{100 * alone['anchor']['table']['right']:.1f} %. Rows: `Sum: w1 + w2 = `, answered with a number. All arms of a seed "
        f"train on the same rows, {BATCH} per step, {1 - NUMBER_SHARE - study_rows.one_word:.0%} of them sums of two of "
        f"{sizes['held_in']} words{mixed} and the rest of two numbers. {sizes['validation']} other words are for choosing "
        f"settings. The columns are % right with greedy decoding and log p of the answer in nats, on {QUESTIONS} sums of the "
        f"remaining {sizes['held_out']} words, {times / len(answers):.1%} of which are {often}. Trained in {precision}, "
        "measured in float32. Means, and each seed.",
    )
    rows = []
    for name, title in TITLES.items():
        runs = [alone[name]] if name in alone else [run[name] for run in seeds.values() if name in run]
        if not runs:
            continue
        trained = name not in alone
        rows.append(
            {
                "": title,
                "seeds": str(len(runs)) if trained else "",
                "trained parameters": f"{runs[0]['trained']:,}" if trained else "",
                "steps": str(runs[0]["steps"]) if trained else "",
                "held-out words": cell(runs, "held_out", "right"),
                "log p": cell(runs, "held_out", "logp"),
                "words of training": cell(runs, "held_in", "right"),
                "numbers": cell(runs, "numbers", "right"),
                "CPU minutes": f"{statistics.mean(run['seconds'] for run in runs) / 60:.1f}" if trained else "",
            }
        )
    print(common.table(rows))
    claims = []
    for base in (name for name in ARMS[1:] if any("calm" in run and name in run for run in seeds.values())):
        told = []
        for quantity, scale, unit in (("right", 100, "points"), ("logp", 1, "nats")):
            mean, half, count = difference(seeds, "calm", base, quantity)
            interval = f" ({scale * (mean - half):+.1f} to {scale * (mean + half):+.1f})" if count in common.T_95 else ""
            told.append(f"{scale * mean:+.1f}{interval} {unit}")
        mean, half, count = difference(seeds, "calm", base, "right")
        required, met = ("> 0 points, one seed", mean > 0) if count == 1 else ("interval > 0 points", mean - half > 0)
        if base == "lora":
            required, met = "≥ 10 points", mean >= 0.1
        claims.append(common.claim(f"CALM minus {TITLES[base]}, held-out words", required, "; ".join(told), met))
    if claims:
        print(common.table(claims))


def main() -> None:
    """Parse the command line, compute what is missing, print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of transformers; needed unless the results are complete")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    for name, value in asdict(Rows()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=HELP[name])
    parser.add_argument("--precision", default="32-true", help="of the trainings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/calm_pretrained"), help="for rows and the augment")
    parser.add_argument("--output", type=Path, help="default: beside this script, a file for each number of words")
    arguments = parser.parse_args()
    here = Path(__file__).with_suffix(".json")
    few = arguments.words == Rows().words
    arguments.output = arguments.output or (here if few else here.with_stem(f"{here.stem}_{arguments.words}_words"))
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.model:
        compute(arguments)
    found = stored(arguments.output)
    if "alone" not in found or "seeds" not in found:
        parser.error(f"{arguments.output} lacks results, and --model is needed to compute them")
    report(found)


if __name__ == "__main__":
    main()
