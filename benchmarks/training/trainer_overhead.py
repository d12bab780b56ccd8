"""Overhead per step of `SFTModule` in a `Trainer` against a hand-written loop.

The loop has the same model, loss, optimizer, clipping and batches. It takes one step each time the Trainer fetches a batch, so
that background load affects both sides. The time between two fetches is the Trainer's step.
"""

import argparse
import gc
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from benchmarks import common
from lightning_align.models.palm import PaLM
from lightning_align.scoring.sums import response_logprobs
from lightning_align.sft.module import SFTModule
from lightning_align.types import TokenBatch

VOCABULARY, ROWS, CLIP = 4_096, 4, 1.0
# Steps per block. Lightning logs every 50th step by default, so a block contains one logging step.
BLOCK = 50
SKIPPED = 10


class Size(NamedTuple):
    """Size of a model, and the number of blocks and runs."""

    dim: int
    depth: int
    heads: int
    blocks: int
    runs: int


SIZES = {"about 200 ms per step": Size(256, 4, 4, blocks=1, runs=3), "tiny": Size(16, 1, 1, blocks=10, runs=3)}


class Bare(L.LightningModule):
    """A minimal module that trains and logs. It shows the cost of Lightning itself."""

    def __init__(self, policy: nn.Module) -> None:
        """Take a model."""
        super().__init__()
        self.policy = policy

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """The mean loss, logged."""
        loss = mean_loss(self.policy, batch)
        self.log("train/loss", loss, batch_size=ROWS)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the loop."""
        return optimizer_of(self.policy)


def mean_loss(policy: nn.Module, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood per target token."""
    logprobs = response_logprobs(policy, batch)
    return -logprobs.sums.sum() / logprobs.counts.sum()


def optimizer_of(policy: nn.Module) -> torch.optim.Optimizer:
    """AdamW without weight decay on vectors, the default of the module."""
    parameters = list(policy.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=SFTModule.default_lr)


def loop_step(policy: nn.Module) -> Callable[[TokenBatch], None]:
    """A step of the hand-written loop."""
    optimizer = optimizer_of(policy)

    def step(batch: TokenBatch) -> None:
        optimizer.zero_grad()
        mean_loss(policy, batch).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()

    return step


class Interleaved:
    """Batches for the Trainer. Fetching one first runs a step of the loop on it, and times both."""

    def __init__(self, batches: list[TokenBatch], steps: int, step: Callable[[TokenBatch], None]) -> None:
        """Store the batches, which are reused in turn, and the number of steps."""
        self.batches, self.steps, self.step = batches, steps, step
        self.loop: list[float] = []
        self.trainer: list[float] = []

    def __len__(self) -> int:
        """Number of batches."""
        return self.steps

    def __iter__(self) -> Iterator[TokenBatch]:
        """Time the Trainer's step, run and time the loop's step, and yield the batch."""
        handed = None
        for index in range(self.steps):
            fetched = time.perf_counter()
            if handed is not None:
                self.trainer.append(fetched - handed)
            batch = self.batches[index % len(self.batches)]
            self.step(batch)
            handed = time.perf_counter()
            self.loop.append(handed - fetched)
            yield batch


def model(size: Size) -> PaLM:
    """The model of a size, the same on both sides."""
    torch.manual_seed(0)
    return PaLM(num_tokens=VOCABULARY, dim=size.dim, depth=size.depth, heads=size.heads)


MODULES: dict[str, Callable[[Size], L.LightningModule]] = {
    "bare Trainer": lambda size: Bare(model(size)),
    "SFTModule": lambda size: SFTModule(model(size)),
}


def run(name: str, size: Size, batches: list[TokenBatch], folder: str) -> dict[str, Any]:
    """One fit: seconds per step in blocks of the Trainer and of the loop, and the background load."""
    data = Interleaved(batches, SKIPPED + size.blocks * BLOCK + 1, loop_step(model(size)))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(folder),
        enable_progress_bar=False,
        gradient_clip_val=CLIP,
    )
    gc.collect()
    with common.Meter() as meter:
        trainer.fit(MODULES[name](size), data)
    spans = [slice(start, start + BLOCK) for start in range(SKIPPED, SKIPPED + size.blocks * BLOCK, BLOCK)]
    return {
        "trainer": [sum(data.trainer[span]) / BLOCK for span in spans],
        "loop": [sum(data.loop[span]) / BLOCK for span in spans],
        # The median of single steps, which excludes logging steps.
        "median": common.median(a - b for a, b in zip(data.trainer[SKIPPED:], data.loop[SKIPPED:], strict=False)),
        "others": meter.others,
    }


def measure() -> None:
    """Print all runs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    pairs = common.synthetic_pairs(8 * ROWS, VOCABULARY)
    batches = [batch["chosen"] for batch in common.batches(pairs, ROWS)]
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, size in SIZES.items():
            results[label] = {name: [] for name in MODULES}
            for _ in range(size.runs):
                for name in MODULES:
                    results[label][name].append(run(name, size, batches, folder))
    print(json.dumps(results))


def report() -> None:
    """Print the section."""
    common.heading(
        "Overhead of a Trainer step above a hand-written loop",
        f"PaLM, vocabulary {VOCABULARY:,}, {ROWS} rows per step, AdamW, clip {CLIP}, float32, two threads. TensorBoard logger, "
        f"no progress bar, default callbacks. Means over blocks of {BLOCK} steps, one of which writes the log. Steps of the "
        "loop and of the Trainer alternate. Medians over blocks.",
    )
    results = common.in_subprocess(__file__, "--measure")
    rows, shares = [], {}
    for label, modules in results.items():
        size = SIZES[label]
        for name, runs in modules.items():
            pairs = [pair for r in runs for pair in zip(r["trainer"], r["loop"], strict=True)]
            shares[label, name] = common.median(a / b - 1 for a, b in pairs)
            rows.append(
                {
                    "model": f"{label}: dim {size.dim}, depth {size.depth}",
                    "side": name,
                    "loop, ms/step": f"{1e3 * common.median(b for _, b in pairs):.2f}",
                    "Trainer, ms/step": f"{1e3 * common.median(a for a, _ in pairs):.2f}",
                    "overhead": f"{shares[label, name]:.1%}",
                    "overhead, ms/step": f"{1e3 * common.median(a - b for a, b in pairs):.2f}",
                    "overhead without logging, ms/step": f"{1e3 * common.median(r['median'] for r in runs):.2f}",
                    "background load": f"{common.median(r['others'] for r in runs):.2f}",
                }
            )
    print(common.table(rows))
    share = shares[next(iter(SIZES)), "SFTModule"]
    print(common.table([common.claim("overhead at about 200 ms per step", "≤ 3 %", f"{share:.1%}", share <= 0.03)]))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.measure:
        measure()
    else:
        report()


if __name__ == "__main__":
    main()
