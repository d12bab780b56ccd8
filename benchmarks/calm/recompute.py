"""Peak memory and time of a CALM training step with and without gradient checkpointing.

The anchor is a PaLM of width 512 and depth 8, and the augment one of width 256. The first connection is at the first layer, so
that gradients go through almost all layers: forward and backward pass of the loss on all tokens of one row.
"""

import argparse
import json
import os
from typing import Any

import torch

from benchmarks import common
from lightning_align import CALM, Augment, PaLM
from lightning_align.calm.module import composed_logprobs

VOCABULARY, WIDTH, DEPTH = 8192, 512, 8


def run(length: int, recompute: bool, rounds: int) -> dict[str, float]:
    """Measure training steps: peak memory above the models, and the median time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_tokens": VOCABULARY, "depth": DEPTH, "dim_head": 64}
    anchor, augment = PaLM(dim=WIDTH, heads=8, **sizes), PaLM(dim=WIDTH // 2, heads=4, **sizes)
    pairs = [[2, 1], [5, 4], [8, 7]]
    model = CALM(anchor, Augment(augment, connections=pairs), gradient_checkpointing=recompute).train()
    tokens = torch.randint(2, VOCABULARY, (1, length))
    targets = (torch.arange(length) > 0).expand_as(tokens)
    batch: Any = {"tokens": tokens, "mask": torch.ones_like(targets), "targets": targets}

    def step() -> None:
        logprobs = composed_logprobs(model, batch, [None])
        (-logprobs.sums.sum() / logprobs.counts.sum()).backward()

    with common.Memory() as memory:
        step()
    timings = common.alternate({"step": step}, rounds)["step"]
    gradient = torch.cat([p.grad.flatten() for p in model.connections.parameters() if p.grad is not None])
    return {
        "bytes": memory.bytes,
        "seconds": common.median(t.seconds for t in timings),
        "others": max(t.others for t in timings),
        "gradient": float(gradient.double().norm()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("plain", "recompute"), help="run once with the first length and print JSON")
    arguments = parser.parse_args()
    if arguments.side is not None:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(run(arguments.lengths[0], arguments.side == "recompute", arguments.rounds)))
        return
    common.heading(
        "CALM: gradient checkpointing",
        f"Forward and backward pass of a composition on one row: anchor of width {WIDTH} and depth {DEPTH}, augment of half "
        f"the width, 3 connections, vocabulary {VOCABULARY}, float32, {arguments.threads} threads. Memory is the peak above "
        f"the models. Steps per side: {arguments.rounds} after the first, each side in its own process.",
    )
    rows, claims = [], []
    for length in arguments.lengths:
        found = {}
        for side in ("plain", "recompute"):
            os.environ["LD_PRELOAD"] = ""  # return freed memory to the system, so that the peak is what the step needs
            options = ("--lengths", str(length), "--rounds", str(arguments.rounds), "--threads", str(arguments.threads))
            found[side] = common.in_subprocess(__file__, "--side", side, *options)
            os.environ.pop("LD_PRELOAD", None)
        plain, recompute = found["plain"], found["recompute"]
        rows.append(
            {
                "tokens": f"{length:,}",
                "without, MiB": f"{plain['bytes'] / common.MIB:,.0f}",
                "with, MiB": f"{recompute['bytes'] / common.MIB:,.0f}",
                "memory ratio": f"{recompute['bytes'] / plain['bytes']:.2f}",
                "without, s": f"{plain['seconds']:.2f}",
                "with, s": f"{recompute['seconds']:.2f}",
                "time ratio": f"{recompute['seconds'] / plain['seconds']:.2f}",
                "background load": f"max {max(plain['others'], recompute['others']):.2f}",
            }
        )
        same = abs(plain["gradient"] - recompute["gradient"]) <= 1e-5 * plain["gradient"]
        claims.append(common.claim(f"gradient norm, {length:,} tokens", "equal", f"{recompute['gradient']:.6g}", same))
    less = recompute["bytes"] / plain["bytes"]
    claims.append(common.claim(f"peak memory, {length:,} tokens", "≤ 0.6x", f"{less:.2f}x", less <= 0.6))
    print(common.table(rows))
    print(common.table(claims))


if __name__ == "__main__":
    main()
