"""Training steps under `torch.compile`: the layers of the model (`compile: inductor`) and the whole step, against neither.

Batches have several widths. Each side first sees all of them twice, and the number of graphs that it compiles in that time and
after it is counted: a graph that is compiled after the warm-up would stop a long run again and again.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch._dynamo.utils import counters

from benchmarks import common
from lightning_align import Augment, CALMModule, DPOModule, PaLM, SFTModule

VOCABULARY, WIDTH, DEPTH, HEADS = 4_096, 256, 4, 4
NUM_BATCHES, WARM_UP = 6, 2
SIDES = ("neither", "layers", "whole step")


def model(dim: int, compile: str | None) -> PaLM:
    """The model of all methods."""
    return PaLM(num_tokens=VOCABULARY, dim=dim, depth=DEPTH, heads=HEADS, dim_head=64, compile=compile)


METHODS: dict[str, Callable[[str | None], Any]] = {
    "SFT": lambda compile: SFTModule(model(WIDTH, compile)),
    "DPO": lambda compile: DPOModule(model(WIDTH, compile)),
    "CALM": lambda compile: CALMModule(model(WIDTH, compile), [Augment(model(WIDTH // 2, compile), every=1)]),
}


def stepper(method: str, side: str, batches: list[Any]) -> Callable[[], None]:
    """A pass over all batches, an optimizer step for each."""
    torch.manual_seed(0)
    module = METHODS[method]("inductor" if side == "layers" else None)
    module.configure_model()
    if side == "whole step":
        optimized: Any = torch.compile(module)
        module = from_compiled(optimized)  # what `Trainer.fit` does
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 3e-4, fused=True)
    module.train()

    def run() -> None:
        for index, batch in enumerate(batches):
            output = module.training_step(batch, index)
            (output["loss"] if isinstance(output, dict) else output).backward()
            module.average_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()

    return run


def report(methods: list[str], rounds: int) -> None:
    """Print the section."""
    common.heading(
        "Compiled training steps",
        f"PaLM of width {WIDTH}, depth {DEPTH}, vocabulary {VOCABULARY:,} (CALM: an augment of half the width), float32, "
        f"{torch.get_num_threads()} threads, {NUM_BATCHES} batches of 8 rows of different widths; {rounds} alternating rounds "
        f"over all batches, after {WARM_UP} rounds of warm-up.",
    )
    pairs = common.batches(common.synthetic_pairs(8 * NUM_BATCHES, VOCABULARY), 8)
    rows = []
    for method in methods:
        batches = [pair if method == "DPO" else pair["chosen"] for pair in pairs]
        steps, warm, graphs = {}, {}, {}
        torch._dynamo.reset()  # not between the sides: it would throw away what the side before has compiled
        for side in SIDES:
            counters.clear()
            steps[side], start = stepper(method, side, batches), time.perf_counter()
            for _ in range(WARM_UP):
                steps[side]()
            warm[side], graphs[side] = time.perf_counter() - start, counters["stats"]["unique_graphs"]
        counters.clear()
        timings = common.alternate(steps, rounds)
        later = counters["stats"]["unique_graphs"]
        for side in SIDES:
            rows.append(
                {
                    "method": method,
                    "compiled": side,
                    "ms/step (median)": f"{1e3 * common.median(t.seconds for t in timings[side]) / NUM_BATCHES:,.0f}",
                    "time / neither": f"{common.ratio(timings[side], timings['neither']):.2f}",
                    "warm-up, s": f"{warm[side]:,.0f}",
                    "graphs": str(graphs[side]),
                    "graphs after the warm-up": "" if side == "neither" else str(later),
                    "background load": common.load(timings[side]),
                }
            )
        del steps
        gc.collect()
    print(common.table(rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # torch's compiler calls what its other parts warn of
    report(arguments.methods, arguments.rounds)


if __name__ == "__main__":
    main()
