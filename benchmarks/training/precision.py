"""An SFT step on a CPU: float32 against bfloat16 autocast (`precision: bf16-mixed`).

Which is faster depends on the CPU and on the model. bfloat16 is faster where the CPU has instructions for it (AMX, AVX512-BF16)
and the matrix products are large enough to pay for the conversions. The first model and its batches are those of `make demo`.
With `--model FOLDER --rows FILE`, a pretrained model is measured instead, fully trained and with LoRA.
"""

import argparse
import contextlib
import json
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
import yaml
from torch import nn

from benchmarks import common
from lightning_align.data.tasks.arithmetic import Arithmetic
from lightning_align.models.lora import LoRAConfig, add_lora, train_only
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.runtime.memory import keep_freed_memory
from lightning_align.scoring.sums import response_logprobs
from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.types import TokenBatch

VOCABULARY, ROWS, DEPTH, CLIP = 4_096, 8, 4, 1.0
PRETRAINED_ROWS, MAX_LENGTH = 4, 512
Make = Callable[[], nn.Module]
DEMO = common.CONFIGS / "sft" / "arithmetic.yaml"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PRECISIONS = ("32-true", "bf16-mixed")


def cases() -> dict[str, tuple[Make, float, list[TokenBatch]]]:
    """What makes the model, the learning rate, and batches to train on, by name."""
    config = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    data = config["data"]["init_args"]
    module = SFTDataModule(
        train=Arithmetic(**{**data["train"]["init_args"], "num_rows": 16 * data["batch_size"]}),
        **{name: data[name] for name in ("batch_size", "max_length", "group_by_length")},
    )
    module.prepare_data()
    module.setup("fit")
    drawn = {"demo, 128": (config["model"]["init_args"]["backbone"]["init_args"], list(module.train_dataloader()))}
    batches = [batch["chosen"] for batch in common.batches(common.synthetic_pairs(8 * ROWS, VOCABULARY), ROWS)]
    shapes = {str(dim): ({"num_tokens": VOCABULARY, "dim": dim, "depth": DEPTH, "heads": 4}, batches) for dim in (128, 256)}
    return {name: (partial(PaLM, **shape), 3e-4, few) for name, (shape, few) in (drawn | shapes).items()}


def with_lora(folder: str) -> nn.Module:
    """The pretrained model with adapters on all linear layers but the output layer."""
    model = PretrainedLM(folder)
    add_lora(model, LoRAConfig(rank=8, alpha=16))
    train_only(model, "default")
    return model


def pretrained(folder: str, rows: str, steps: int) -> dict[str, tuple[Make, float, list[TokenBatch]]]:
    """The same for a folder of weights, on the first rows of a file."""
    data = SFTDataModule(rows, tokenizer=folder, batch_size=PRETRAINED_ROWS, max_length=MAX_LENGTH, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    batches = list(islice(data.train_dataloader(), steps))
    return {
        "pretrained, all weights": (partial(PretrainedLM, folder), 1e-5, batches),
        "pretrained, LoRA": (partial(with_lora, folder), 1e-4, batches),
    }


def stepper(make: Make, rate: float, batches: list[TokenBatch], precision: str) -> Callable[[], float]:
    """A training step with its own model, which returns the loss."""
    torch.manual_seed(0)
    policy = make().train()
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), rate, fused=True)
    turns = cycle(batches)

    def step() -> float:
        mixed = precision == "bf16-mixed"
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            logprobs = response_logprobs(policy, next(turns))
            loss = -logprobs.sums.sum() / logprobs.counts.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(rounds: int, measured: dict[str, tuple[Make, float, list[TokenBatch]]]) -> None:
    """Print all timings."""
    results = {}
    for name, (make, rate, batches) in measured.items():
        steps = {precision: stepper(make, rate, batches, precision) for precision in PRECISIONS}
        for step in steps.values():
            for _ in batches[:16]:
                step()
        results[name] = common.alternate({precision: partial(step) for precision, step in steps.items()}, rounds, cpu=True)
    print(json.dumps(results))


def curves(steps: int, name: str, measured: dict[str, tuple[Make, float, list[TokenBatch]]]) -> None:
    """Print how far the losses of two runs from the same weights on the same batches are apart."""
    each = {precision: stepper(*measured[name], precision) for precision in PRECISIONS}
    full, half = (torch.tensor([step() for _ in range(steps)]) for step in each.values())
    # Means of ten steps, because batches differ.
    full, half = (losses.unfold(0, 10, 10).mean(1) for losses in (full, half))
    common.heading(
        "Curves in two precisions",
        f"{name[0].upper()}{name[1:]}: {steps} steps from the same weights on the same batches; means of ten steps, "
        "nats per token.",
    )
    rows = [
        {
            "steps": f"{10 * i + 1} to {10 * i + 10}",
            "32-true": f"{float(full[i]):.4f}",
            "bf16-mixed": f"{float(half[i]):.4f}",
        }
        for i in sorted({0, len(full) // 4, len(full) // 2, 3 * len(full) // 4, len(full) - 1})
    ]
    print(common.table(rows))
    print(f"\nLargest difference of all means: {float((full - half).abs().max()):.4f} nats per token.")


def report(rounds: int, model: str | None, rows_of: str | None) -> None:
    """Print the section."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    lacking = [flag for flag in FLAGS if flag not in flags]
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    palm = (
        f"PaLM, {threads}: the model of `make demo` (vocabulary 259, 64 rows of up to 48 tokens), then depth "
        f"{DEPTH}, vocabulary {VOCABULARY:,}, {ROWS} rows"
    )
    common.heading(
        "Precision on this CPU",
        f"An SFT step of {f'a pretrained model, {threads}, {PRETRAINED_ROWS} rows of a file' if model else palm}; "
        f"{rounds} alternating rounds. The CPU has "
        f"{', '.join(flag for flag in FLAGS if flag in flags) or 'none of the instructions'} and lacks "
        f"{', '.join(lacking) or 'nothing'}.",
    )
    more = ["--model", model, "--rows", rows_of] if model and rows_of else []
    results = common.in_subprocess(
        __file__, "--measure", "--rounds", str(rounds), "--threads", str(torch.get_num_threads()), *more
    )
    rows = []
    for model, timed in results.items():
        timings = {name: [common.Timing(*timing) for timing in timed[name]] for name in PRECISIONS}
        for name in PRECISIONS:
            rows.append(
                {
                    "model, width": model,
                    "precision": name,
                    "CPU ms/step (median)": f"{1e3 * common.median(t.seconds for t in timings[name]):.0f}",
                    "time / float32": f"{common.ratio(timings[name], timings['32-true']):.2f}",
                    "background load": common.load(timings[name]),
                }
            )
    print(common.table(rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--curves", type=int, default=0, help="only compare the losses of this many steps")
    parser.add_argument("--model", help="folder of a pretrained model, which is measured instead")
    parser.add_argument("--rows", help="with --model: JSONL with prompt and response")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.rows):
        parser.error("--model and --rows need each other: a folder of weights, and the rows to train on")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command line does
    if not (arguments.curves or arguments.measure):
        report(arguments.rounds, arguments.model, arguments.rows)
        return
    # A few batches are taken in turns to measure time. Curves see each batch once.
    measured = pretrained(arguments.model, arguments.rows, arguments.curves or 4) if arguments.model else cases()
    if arguments.curves:
        curves(arguments.curves, next(iter(measured)), measured)
    else:
        measure(arguments.rounds, measured)


if __name__ == "__main__":
    main()
