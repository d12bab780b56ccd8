"""A training step in float32 against bfloat16 autocast (`precision: bf16-mixed`), on this machine's CPU.

Which is faster depends on the CPU: bfloat16 wins where there are instructions for it (AMX, AVX512-BF16).
"""

import argparse
import contextlib
import json
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import _common as common
import torch
from torch import nn

from lightning_align.logprobs import response_logprobs
from lightning_align.models.palm import PaLM
from lightning_align.types import TokenBatch

VOCABULARY, ROWS, DEPTH, CLIP = 4_096, 8, 4, 1.0
WIDTHS = (128, 256)
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PRECISIONS = ("32-true", "bf16-mixed")


def stepper(dim: int, precision: str, batches: list[TokenBatch]) -> Callable[[], None]:
    """A training step of a model of its own."""
    torch.manual_seed(0)
    policy = PaLM(num_tokens=VOCABULARY, dim=dim, depth=DEPTH, heads=4)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-4)
    turns = cycle(batches)

    def step() -> None:
        mixed = precision == "bf16-mixed"
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            logprobs = response_logprobs(policy, next(turns))
            loss = -logprobs.sums.sum() / logprobs.counts.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(rounds: int) -> None:
    """Print all timings."""
    batches = [batch["chosen"] for batch in common.batches(common.synthetic_pairs(8 * ROWS, VOCABULARY), ROWS)]
    results = {}
    for dim in WIDTHS:
        steps = {precision: stepper(dim, precision, batches) for precision in PRECISIONS}
        for step in steps.values():
            for _ in batches:
                step()
        results[dim] = common.alternate({name: partial(step) for name, step in steps.items()}, rounds)
    print(json.dumps(results))


def report(rounds: int) -> None:
    """Print the section."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    lacking = [flag for flag in FLAGS if flag not in flags]
    common.heading(
        "Precision on this CPU",
        f"An SFT step of PaLM, depth {DEPTH}, vocabulary {VOCABULARY:,}, {ROWS} rows, two threads; {rounds} rounds, "
        f"alternating. The CPU has {', '.join(flag for flag in FLAGS if flag in flags) or 'none of the instructions'} and "
        f"lacks {', '.join(lacking) or 'nothing'}.",
    )
    results = common.in_subprocess(__file__, "--measure", "--rounds", str(rounds))
    rows = []
    for dim, timed in results.items():
        timings = {name: [common.Timing(*timing) for timing in timed[name]] for name in PRECISIONS}
        for name in PRECISIONS:
            rows.append(
                {
                    "width": dim,
                    "precision": name,
                    "ms/step (median)": f"{1e3 * common.median(t.seconds for t in timings[name]):.0f}",
                    "time over float32": f"{common.ratio(timings[name], timings['32-true']):.2f}",
                    "load of others": common.load(timings[name]),
                }
            )
    print(common.table(rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.measure:
        measure(arguments.rounds)
    else:
        report(arguments.rounds)


if __name__ == "__main__":
    main()
