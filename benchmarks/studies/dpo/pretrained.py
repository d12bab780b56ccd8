"""DPO of a pretrained model with LoRA, step by step beside `DPOTrainer` of TRL: loss, rewards, accuracies, time and memory.

Both sides load the same folder, start from the same adapters, and see the same batches in the same order, so their curves must
lie on each other. The control is a third side: ours, with adapters drawn from another seed. If its curves were as close, the
comparison would show nothing.
"""

import argparse
import functools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import turns
from lightning_align import DPODataModule
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.dpo.batch import concatenate
from lightning_align.models.lora import LoRAConfig, add_lora, lora_layers, train_only
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.references.frozen import AdaptersOff
from lightning_align.scoring.losses import sigmoid_loss
from lightning_align.scoring.ratios import log_ratios, pair_metrics
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch

RANK, ALPHA, BETA, LEARNING_RATE, CLIP = 8, 16, 0.1, 1e-4, 1.0
SHOWN = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
Point = dict[str, float]


def adapters(folder: str, seed: int) -> dict[str, Tensor]:
    """The matrices A of the adapters, (in, rank), by the name of the layer in the model of transformers. B starts at 0."""
    model = adapted(folder)
    torch.manual_seed(seed)
    return {name: torch.empty_like(layer.lora["default"].A).uniform_(-0.04, 0.04) for name, layer in lora_layers(model)}


def adapted(folder: str) -> PretrainedLM:
    """Our model with adapters on all linear layers but the output layer."""
    model = PretrainedLM(folder)
    add_lora(model, LoRAConfig(rank=RANK, alpha=ALPHA))
    train_only(model, "default")
    return model


def updates(model: nn.Module) -> Callable[[], None]:
    """Clipping and AdamW, for both sides."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return update


def ours(folder: str, starts: dict[str, Tensor], batches: list[PreferenceBatch], curve: Path) -> Callable[[int], float]:
    """A step of ours, with the metrics that `DPOModule` logs."""
    model, reference = adapted(folder), AdaptersOff()
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora["default"].A.copy_(starts[name])
    update, points = updates(model.train()), list[Point]()

    def step(number: int) -> float:
        both = concatenate(batches[number])
        referred = reference.logprobs(model, both)
        scored = response_logprobs(model, both)
        ratios = log_ratios(scored, referred)
        loss = sigmoid_loss(ratios, beta=BETA).mean()
        loss.backward()
        update()
        found = {name: float(values.mean()) for name, values in pair_metrics(scored, ratios, beta=BETA).items()}
        points.append({"loss": float(loss), **{name: found[name] for name in SHOWN[1:]}})
        common.save(curve, points)
        return float(loss)

    return step


def peer(folder: str, starts: dict[str, Tensor], batches: list[PreferenceBatch], curve: Path) -> Callable[[int], float]:
    """A training step of TRL's trainer, with PEFT's LoRA on the same layers."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from benchmarks.common import peer_trl
    from benchmarks.dpo.trl_step import inputs

    pairs = len(batches[0]["chosen"]["tokens"])
    names = sorted(name.removeprefix("model.") for name in starts)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(beta=BETA, **peer_trl.settings(pairs)),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * pairs),  # it requires a dataset
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0),
    )
    trainer.current_gradient_accumulation_steps = 1  # `train` would set this
    model: Any = trainer.model
    copied = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(starts[name.removeprefix("base_model.model.").partition(".lora_A.")[0].join(("model.", ""))].T)
                copied += 1
    assert copied == len(starts), f"{copied} adapters of {len(starts)} were set"
    ready = [inputs(batch) for batch in batches]
    update, points = updates(model.train()), list[Point]()

    def step(number: int) -> float:
        trainer._metrics["train"].clear()
        loss = float(trainer.training_step(model, dict(ready[number])))
        update()
        found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        points.append({"loss": loss, **{name: found[name] for name in SHOWN[1:]}})
        common.save(curve, points)
        return loss

    return step


SIDES = {"peer": peer, "ours": ours, "ours, other adapters": ours}


def encoded(folder: str, file: str, rows: int, size: int, longest: int) -> list[PreferenceBatch]:
    """The first pairs of a file whose texts have at most so many tokens, as batches in the order of the file."""
    tokenizer, kept = load_tokenizer(folder), list[str]()
    for row in common.read_rows(file):
        texts = [row["prompt"] + row[name] for name in ("chosen", "rejected")]
        if max(len(encoding.ids) for encoding in tokenizer.encode_batch(texts)) <= longest:
            for key, role in {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}.items():
                row[key] = [{"role": role, "content": row[key]}] if tokenizer.has_template else row[key]
            kept.append(json.dumps(row))
    if len(kept) < rows:
        sys.exit(f"{file} has {len(kept)} pairs of at most {longest} tokens, and {rows} are needed. Raise --longest.")
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "pairs.jsonl").write_text("\n".join(kept[:rows]) + "\n", encoding="utf-8")
        # `validation` keeps the order of the file.
        source = str(Path(place) / "pairs.jsonl")
        data = DPODataModule(train=source, validation=source, tokenizer=folder, batch_size=size, cache_dir=place)
        data.prepare_data()
        data.setup("validate")
        loader: Any = data.val_dataloader()
        return [{side: {key: batch[side][key] for key in ("tokens", "mask", "targets")} for side in ("chosen", "rejected")}
                for batch in loader]  # fmt: skip


def gap(first: Sequence[Point], second: Sequence[Point], name: str) -> float:
    """The greatest difference of two curves."""
    return max(abs(a[name] - b[name]) for a, b in zip(first, second, strict=True))


def main() -> None:
    """Parse the command line, let the sides step in turns, print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of transformers; needed unless the results are there")
    parser.add_argument("--pairs", metavar="FILE", help="JSONL with prompt, chosen and rejected; needed as --model is")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2, help="pairs per step")
    parser.add_argument("--longest", type=int, default=120, help="tokens of prompt and response, without the template")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # the peer warns about the settings used here
    if arguments.side:
        starts, batches = torch.load(arguments.work / f"{arguments.side}.pt")
        curve = arguments.work / f"{arguments.side}.json"
        return turns.serve(functools.partial(SIDES[arguments.side], arguments.model, starts, batches, curve))
    if not arguments.output.exists():
        if not (arguments.model and arguments.pairs):
            parser.error("--model and --pairs are needed to compute results")
        run(arguments)
    report(json.loads(arguments.output.read_text(encoding="utf-8")))


def run(arguments: argparse.Namespace) -> None:
    """Compute the results."""
    batches = encoded(arguments.model, arguments.pairs, arguments.steps * arguments.rows, arguments.rows, arguments.longest)
    with tempfile.TemporaryDirectory() as place:
        for side in SIDES:
            starts = adapters(arguments.model, 1 if "other" in side else 0)
            torch.save((starts, batches), Path(place) / f"{side}.pt")
        words = ("--model", arguments.model, "--threads", str(arguments.threads), "--work", place)
        runs = turns.take_turns(__file__, list(SIDES), *words, rounds=len(batches) - 1)
        curves = {side: json.loads((Path(place) / f"{side}.json").read_text(encoding="utf-8")) for side in SIDES}
    padding, responses = common.shares(batches)
    found = {
        "settings": {name: getattr(arguments, name) for name in ("steps", "rows", "longest", "threads")},
        "tokens": int(sum(batch[side]["mask"].sum() for batch in batches for side in ("chosen", "rejected"))),
        "padding": padding,
        "responses": responses,
        "curves": curves,
        "bytes": {side: runs[side].bytes for side in SIDES},
        "seconds": {side: [timing.seconds for timing in runs[side].timings] for side in SIDES},
        "others": {side: [timing.others for timing in runs[side].timings] for side in SIDES},
    }  # fmt: skip
    common.save(arguments.output, found)


def report(found: dict[str, Any]) -> None:
    """Print the section."""
    settings, curves = found["settings"], found["curves"]
    common.heading(
        "DPO of SmolLM2-135M-Instruct beside TRL",
        f"LoRA of rank {RANK} on all linear layers but the output layer, {settings['rows']} pair(s) per step, "
        f"{settings['steps']} steps, beta {BETA}, AdamW {LEARNING_RATE:g}, clip {CLIP}, float32, "
        f"{settings['threads']} thread(s); pairs of GSM8K problems in the model's chat template, "
        f"{found['tokens'] / settings['steps'] / settings['rows'] / 2:.0f} tokens per row, {found['padding']:.0%} padding, "
        f"{found['responses']:.0%} response tokens. Each side has its own process; "
        "the sides take turns. Memory: peak above the interpreter and its imports, with the weights.",
    )
    rows = []
    for side in SIDES:
        timings = [common.Timing(*pair) for pair in zip(found["seconds"][side], found["others"][side], strict=True)]
        against = [common.Timing(*pair) for pair in zip(found["seconds"]["peer"], found["others"]["peer"], strict=True)]
        differences = {f"gap in {name}": f"{gap(curves[side], curves['peer'], name):.1e}" for name in SHOWN}
        rows.append(
            {
                "side": side,
                "s/step (median)": f"{common.median(found['seconds'][side]):.2f}",
                "time / peer": f"{common.ratio(timings, against):.2f}",
                "peak memory, MiB": f"{found['bytes'][side] / common.MIB:,.0f}",
                "memory / peer": f"{found['bytes'][side] / found['bytes']['peer']:.2f}",
                "background load": common.load(timings),
                **differences,
            }
        )
    print(common.table(rows))
    lines = []
    for number in range(settings["steps"]):
        cells = {"step": str(number + 1)}
        for name in ("loss", "rewards/margins", "rewards/accuracies"):
            for side in ("ours", "peer"):
                cells[f"{name}, {side}"] = f"{curves[side][number][name]:.6f}"
        lines.append(cells)
    print(common.table(lines))
    print(common.table([
        common.claim(f"gap of ours to the peer in {name}", "≤ 1e-3", f"{gap(curves['ours'], curves['peer'], name):.1e}",
                     gap(curves["ours"], curves["peer"], name) <= 1e-3)
        for name in ("loss", "rewards/chosen", "rewards/rejected")
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
