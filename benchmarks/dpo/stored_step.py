"""A DPO step with stored log-probs of the reference, against one that runs the frozen reference.

Both sides have the same policy, batches, optimizer and clipping. The stored side finds the log-probs by hashes of the rows, as
`DPOModule(reference="stored")` does. The pass that computes and stores them is timed separately.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import nn

from benchmarks import common
from lightning_align.dpo.batch import concatenate
from lightning_align.models.palm import PaLM
from lightning_align.models.weights import weights_hash
from lightning_align.references.frozen import frozen_copy
from lightning_align.references.protocol import Reference
from lightning_align.references.stored import StoredLogProbs
from lightning_align.scoring.losses import sigmoid_loss
from lightning_align.scoring.ratios import log_ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch

VOCABULARY, WIDTH, DEPTH, HEADS, PAIRS = 32_000, 256, 4, 4, 8
LEARNING_RATE, CLIP, BETA = 1e-4, 1.0, 0.1
NUMBER_OF_BATCHES = 4
SIDES = ("frozen", "stored")


def model() -> PaLM:
    """Policy and reference."""
    torch.manual_seed(0)
    return PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64)


def stepper(reference: Reference) -> Callable[[PreferenceBatch], None]:
    """A training step with its own policy and optimizer."""
    policy = model()
    optimizer = torch.optim.AdamW(policy.parameters(), LEARNING_RATE)

    def step(batch: PreferenceBatch) -> None:
        both = concatenate(batch)
        ratios = log_ratios(response_logprobs(policy, both), reference.logprobs(policy, both))
        sigmoid_loss(ratios, beta=BETA).mean().backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(rounds: int) -> None:
    """Print the times of both sides, alternating batch by batch, and of the pass that stores the log-probs."""
    batches = common.batches(common.synthetic_pairs(NUMBER_OF_BATCHES * PAIRS, VOCABULARY), PAIRS)
    live = frozen_copy(model())
    with tempfile.TemporaryDirectory() as folder:
        stored = StoredLogProbs(live.logprobs, weights=weights_hash(live.model), precision="32-true", cache_dir=folder)
        start = time.perf_counter()
        stored.fill(map(concatenate, batches), live.model, torch.device("cpu"))
        seconds = time.perf_counter() - start
        stored.finish()
        steps = {"frozen": stepper(live), "stored": stepper(stored)}
        for step in steps.values():
            for batch in batches[:2]:
                step(batch)
        iterators: dict[str, Iterator[PreferenceBatch]] = {side: cycle(batches) for side in SIDES}
        turns = {side: partial(lambda s: steps[s](next(iterators[s])), side) for side in SIDES}
        print(json.dumps({"pass": seconds / len(batches), **common.alternate(turns, rounds)}))


def report(rounds: int) -> None:
    """Print the section."""
    common.heading(
        "A DPO step with stored reference log-probs",
        f"PaLM, vocabulary {VOCABULARY:,}, width {WIDTH}, depth {DEPTH}, {PAIRS} synthetic pairs per step, AdamW, clip {CLIP}, "
        f"float32, two threads; {rounds} alternating rounds after two warm-up steps per side.",
    )
    results = common.in_subprocess(__file__, "--measure", "--rounds", str(rounds))
    timings = {side: [common.Timing(*timing) for timing in results[side]] for side in SIDES}
    speeds = {side: 1 / common.ratio(timings[side], timings["frozen"]) for side in SIDES}
    rows = [
        {
            "reference": side,
            "s/step (median)": f"{common.median(t.seconds for t in timings[side]):.2f}",
            "speedup over frozen": f"{speeds[side]:.2f}x",
            "storing, s/batch": f"{results['pass']:.2f}" if side == "stored" else "",
            "background load": common.load(timings[side]),
        }
        for side in SIDES
    ]
    print(common.table(rows))
    speed = speeds["stored"]
    print(common.table([common.claim("speed with stored log-probs", "≥ 1.25x", f"{speed:.2f}x", speed >= 1.25)]))


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
