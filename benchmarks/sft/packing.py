"""Tokens per CPU second of fine-tuning on packed rows against padded rows, shuffled and grouped by length.

All sides run the forward and backward pass on the same rows, whose lengths differ widely. The
measure is the CPU time of one thread. Wall-clock time varies by a factor of two while other processes run, CPU time by a few
percent.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import common
from lightning_align import PaLM
from lightning_align.data.batching import LengthGroupedSampler, collate_tokens
from lightning_align.data.row_packing import PackedSampler, collate_packed
from lightning_align.data.store import StoredRow, StoredTokens
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import TokenBatch

VOCABULARY, WIDTH, DEPTH, HEADS = 4096, 256, 4, 4
ROWS, LONGEST = 24, 1024
BATCH = 8
SIDES = ("shuffled", "grouped", "packed")
SEQUENCES = 2
"""Sequences per packed batch: about as many tokens as 8 rows."""


def rows() -> list[StoredRow]:
    """Rows with log-normal lengths, the first half of each the prompt."""
    random = np.random.default_rng(0)
    found = []
    for index, length in enumerate(np.exp(random.normal(5.2, 0.9, ROWS)).clip(8, LONGEST).astype(int)):
        tokens = random.integers(0, VOCABULARY, length).astype(np.int32)
        found.append(StoredRow(index, length // 2, [StoredTokens(tokens, np.arange(length) >= length // 2, 0)]))
    return found


def batches(side: str, data: Sequence[StoredRow]) -> Iterator[TokenBatch]:
    """The batches of one epoch."""
    lengths = np.array([len(row.sides[0].tokens) for row in data])
    if side == "packed":
        for sequences in PackedSampler(lengths, capacity=LONGEST, batch_size=SEQUENCES):
            yield collate_packed([[data[i] for i in sequence] for sequence in sequences], pad_id=0)
        return
    for batch in LengthGroupedSampler(lengths if side == "grouped" else None, num_rows=len(data), batch_size=BATCH):
        yield collate_tokens([data[i] for i in batch], pad_id=0)


def epoch(model: nn.Module, todo: Sequence[TokenBatch]) -> float:
    """The loss of an epoch, with its gradient in the parameters."""
    model.zero_grad()
    total = 0.0
    for batch in todo:
        loss = -response_logprobs(model, batch).sums.sum()
        loss.backward()
        total += float(loss.detach())
    return total


def cpu_seconds(model: nn.Module, todo: dict[str, list[TokenBatch]], rounds: int) -> dict[str, list[float]]:
    """The CPU seconds of the epochs of each side, which take turns."""
    seconds: dict[str, list[float]] = {side: [] for side in todo}
    order = list(todo)
    for _ in range(rounds):
        for side in order:
            start = time.process_time()
            epoch(model, todo[side])
            seconds[side].append(time.process_time() - start)
        order = order[1:] + order[:1]
    return seconds


def models() -> dict[str, nn.Module]:
    """A PaLM and a Llama of the same width and depth."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
    }
    palm = PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=WIDTH // HEADS)
    return {"PaLM": palm, "Llama (transformers)": PretrainedLM(config=config)}


def main() -> None:
    """Measure and print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs per side, after one to warm up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = rows()
    todo = {side: list(batches(side, data)) for side in SIDES}
    num_tokens = sum(len(row.sides[0].tokens) for row in data)
    lengths = [len(row.sides[0].tokens) for row in data]
    common.heading(
        "Packing of rows",
        f"{ROWS} rows of {min(lengths)} to {max(lengths)} tokens (median {common.median(lengths):.0f}), vocabulary "
        f"{VOCABULARY:,}, width {WIDTH}, depth {DEPTH}, float32, CPU time of one thread; forward and backward pass. "
        f"Batches of {BATCH} rows (shuffled, grouped by length) or {SEQUENCES} sequences of {LONGEST:,} tokens (packed). "
        f"{arguments.rounds} alternating epochs per side after one to warm up.",
    )
    table, claims = [], []
    for name, model in models().items():
        losses = {side: epoch(model, todo[side]) for side in SIDES}
        seconds = cpu_seconds(model, todo, arguments.rounds)
        for side in SIDES:
            ratios = [theirs / ours for theirs, ours in zip(seconds[side], seconds["packed"], strict=True)]
            cells = sum(batch["mask"].numel() for batch in todo[side])
            table.append(
                {
                    "model": name,
                    "side": side,
                    "padding": f"{1 - num_tokens / cells:.0%}",
                    "tokens per CPU second (median)": f"{num_tokens / common.median(seconds[side]):,.0f}",
                    "spread": f"{max(seconds[side]) / min(seconds[side]) - 1:.0%}",
                    "speedup of packed": f"{statistics.median(ratios):.2f}x",
                }
            )
        error = max(abs(losses[side] / losses["packed"] - 1) for side in SIDES)
        claims.append(common.claim(f"{name}: difference of the losses", "≤ 1e-06", f"{error:.1e}", error <= 1e-6))
    print(common.table(table))
    print(common.table(claims))


if __name__ == "__main__":
    main()
