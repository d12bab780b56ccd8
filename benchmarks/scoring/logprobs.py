"""Log-probs of targets: `head_logprobs` against linear, log_softmax and gather.

Forward and backward pass of the output layer alone. All positions are targets, the worst case for this library.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from lightning_align.scoring.head import head_logprobs

VOCABULARY, POSITIONS, WIDTH = 128_000, 16 * 512, 256
TOLERANCE = 1e-5


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What most code does: all logits, all log-probs, then one log-prob per row."""
    return F.linear(hidden, weight).log_softmax(dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What this library does."""
    return head_logprobs(hidden, weight, None, targets)


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"naive": naive, "ours": ours}


class Inputs:
    """Hidden states, an output layer, targets and an upstream gradient."""

    def __init__(self, vocabulary: int, positions: int) -> None:
        """Draw them. The logits have a standard deviation of about 1.6."""
        torch.manual_seed(0)
        self.hidden = torch.randn(positions, WIDTH).requires_grad_()
        self.weight = (torch.randn(vocabulary, WIDTH) * 0.1).requires_grad_()
        self.targets = torch.randint(vocabulary, (positions,))
        self.upstream = torch.randn(positions)

    def step(self, side: str) -> None:
        """Forward and backward pass, with gradients reset before."""
        self.hidden.grad = self.weight.grad = None
        SIDES[side](self.hidden, self.weight, self.targets).backward(self.upstream)


def memory(side: str) -> None:
    """Print the peak memory of one side above the inputs, and the size of its gradients, in bytes."""
    inputs = Inputs(VOCABULARY, POSITIONS)
    with common.Meter() as meter, common.Memory() as used:
        inputs.step(side)
    gradients = sum(x.grad.nbytes for x in (inputs.hidden, inputs.weight) if x.grad is not None)
    print(json.dumps({"bytes": used.bytes, "gradients": gradients, "others": meter.others}))


def errors(vocabulary: int, positions: int) -> list[dict[str, str]]:
    """The largest errors of both sides against float64."""
    inputs = Inputs(vocabulary, positions)
    hidden, weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    exact = naive(hidden, weight, inputs.targets)
    exact.backward(inputs.upstream.double())
    rows = []
    for side, function in SIDES.items():
        inputs.hidden.grad = inputs.weight.grad = None
        values = function(inputs.hidden, inputs.weight, inputs.targets)
        values.backward(inputs.upstream)
        got = {"log-probs": values, "gradient of hidden": inputs.hidden.grad, "gradient of weight": inputs.weight.grad}
        for (name, value), want in zip(got.items(), (exact, hidden.grad, weight.grad), strict=True):
            assert value is not None and want is not None
            difference = (value.double() - want).abs().max().item()
            scale = want.abs().max().item()
            rows.append(
                {
                    "vocabulary": f"{vocabulary:,}",
                    "positions": str(positions),
                    "side": side,
                    "quantity": name,
                    "max. abs. error": f"{difference:.1e}",
                    "relative to largest value": f"{difference / scale:.1e}",
                }
            )
    return rows


def report(rounds: int, thp: bool) -> None:
    """Print the section."""
    torch.set_num_threads(2)
    common.heading(
        "Log-probs: `head_logprobs` against linear, log_softmax, gather",
        f"Vocabulary {VOCABULARY:,}, {POSITIONS:,} positions, width {WIDTH}, float32, forward and backward pass, two "
        f"threads{', huge pages' if thp else ''}. Time: {rounds} alternating rounds. Memory: peak above the inputs, each side "
        "in its own process.",
    )
    used = {side: common.in_subprocess(__file__, "--memory", side, thp=thp) for side in SIDES}
    script = ["--time", "--rounds", str(rounds)]
    timed = common.in_subprocess(__file__, *script, thp=thp)["timings"]
    timings = {side: [common.Timing(*timing) for timing in timed[side]] for side in SIDES}
    rows = [
        {
            "side": side,
            "s (median)": f"{common.median(t.seconds for t in timings[side]):.2f}",
            "background load": common.load(timings[side]),
            "peak memory, MiB": f"{used[side]['bytes'] / common.MIB:,.0f}",
            "gradients, MiB": f"{used[side]['gradients'] / common.MIB:,.0f}",
            "background load (memory)": f"{used[side]['others']:.2f}",
        }
        for side in SIDES
    ]
    print(common.table(rows))
    error_rows = [*errors(1_000, 4_096), *errors(VOCABULARY, 128)]
    print(common.table(error_rows))
    time_ratio = common.ratio(timings["ours"], timings["naive"])
    memory_ratio = used["ours"]["bytes"] / used["naive"]["bytes"]
    worst = max(float(row["max. abs. error"]) for row in error_rows if row["side"] == "ours")
    claims = [
        common.claim("time, ours / naive", "≤ 1.0", f"{time_ratio:.2f}", time_ratio <= 1),
        common.claim("memory, ours / naive", "≤ 0.15", f"{memory_ratio:.3f}", memory_ratio <= 0.15),
        common.claim("error of values and gradients", f"≤ {TOLERANCE:.0e}", f"{worst:.1e}", worst <= TOLERANCE),
    ]
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--thp", action="store_true", help="use huge pages on both sides")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.memory:
        memory(arguments.memory)
    elif arguments.time:
        inputs = Inputs(VOCABULARY, POSITIONS)
        print(json.dumps({"timings": common.alternate({s: partial(inputs.step, s) for s in SIDES}, arguments.rounds)}))
    else:
        report(arguments.rounds, arguments.thp)


if __name__ == "__main__":
    main()
