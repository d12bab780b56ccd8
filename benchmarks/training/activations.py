"""Peak memory and time of a training step with and without activation checkpointing.

Forward and backward pass of a PaLM on the loss of all tokens of one row. Each side runs in its own process.
"""

import argparse
import json
import os

import torch

from benchmarks import common
from lightning_align import PaLM
from lightning_align.models.activations import ActivationSwitch
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import TokenBatch

VOCABULARY, WIDTH, DEPTH = 8192, 512, 8


def run(length: int, recompute: bool, rounds: int) -> dict[str, float]:
    """Measure training steps: peak memory above the model, and the median time."""
    torch.manual_seed(0)
    model = PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=8, dim_head=64).train()
    tokens = torch.randint(2, VOCABULARY, (1, length))
    targets = (torch.arange(length) > 0).expand_as(tokens)
    batch: TokenBatch = {"tokens": tokens, "mask": torch.ones_like(targets), "targets": targets}
    switch = ActivationSwitch(recompute)

    def step() -> None:
        switch.start(model)
        model.zero_grad()
        response_logprobs(model, batch).sums.sum().backward()
        switch.end()

    with common.Memory() as memory:
        step()
    timings = common.alternate({"step": step}, rounds)["step"]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
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
        "Activation checkpointing",
        f"Forward and backward pass of a PaLM on one row: width {WIDTH}, depth {DEPTH}, vocabulary {VOCABULARY}, float32, "
        f"{arguments.threads} threads. Memory is the peak above the model, with its gradients. Steps per side: "
        f"{arguments.rounds} after the first, each side in its own process.",
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
