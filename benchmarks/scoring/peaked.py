"""Log-probs with peaked logits, as trained models have them: `head_logprobs` against linear, log_softmax and gather.

Peaked logits give subnormal probabilities, which slow down matrix products on many CPUs. Random weights never show this.
"""

import argparse
from functools import partial

import torch

from benchmarks import common
from benchmarks.scoring.logprobs import naive, ours

VOCABULARY, POSITIONS, WIDTH = 49_152, 600, 576
DEVIATIONS = (1, 8, 20)


class Inputs:
    """Hidden states, an output layer and targets of the size of SmolLM2-135M."""

    def __init__(self, deviation: float) -> None:
        """Draw them, so that the logits have this standard deviation."""
        torch.manual_seed(0)
        self.hidden = (deviation * torch.randn(POSITIONS, WIDTH)).requires_grad_()
        self.weight = (torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_()
        self.targets = torch.randint(VOCABULARY, (POSITIONS,))
        probabilities = (self.hidden @ self.weight.T).detach().double().softmax(1).float()
        self.subnormal = ((probabilities > 0) & (probabilities < torch.finfo(torch.float32).tiny)).double().mean().item()

    def step(self, side: str) -> None:
        """Forward and backward pass, with gradients reset before."""
        self.hidden.grad = self.weight.grad = None
        {"ours": ours, "naive": naive}[side](self.hidden, self.weight, self.targets).sum().backward()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    common.heading(
        "Log-probs of peaked logits",
        f"Vocabulary {VOCABULARY:,}, {POSITIONS} positions, width {WIDTH}, float32, forward and backward pass, two threads. "
        f"Subnormal: share of the probabilities. Time: {rounds} alternating rounds, median.",
    )
    rows, first = [], None
    for deviation in DEVIATIONS:
        inputs = Inputs(deviation)
        timings = common.alternate({side: partial(inputs.step, side) for side in ("naive", "ours")}, rounds)
        taken = {side: common.median(t.seconds for t in some) for side, some in timings.items()}
        first = first or taken
        rows.append(
            {
                "standard deviation of the logits": str(deviation),
                "subnormal": f"{inputs.subnormal:.0%}",
                **{f"{side}, s": f"{seconds:.2f}" for side, seconds in taken.items()},
                **{f"{side}, ratio to deviation 1": f"{taken[side] / first[side]:.2f}" for side in taken},
                "background load": common.load(timings["ours"]),
            }
        )
    print(common.table(rows))


if __name__ == "__main__":
    main()
