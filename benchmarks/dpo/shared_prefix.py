"""A DPO step whose pairs share their prompt, against our step on separate rows and against `DPOTrainer` of TRL 1.16.

All sides train the same Llama on the same pairs, with a frozen reference. ``recomputed`` is with gradient checkpointing. The
pairs are those of a file, or random ones with prompts of 512 tokens and answers of 128.
"""

import argparse
import functools
import logging
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import peer_trl, turns
from benchmarks.dpo.trl_step import BETA, peer
from lightning_align.dpo.batch import concatenate
from lightning_align.models.shared_rows import plan_prefixes
from lightning_align.references.frozen import frozen_copy
from lightning_align.runtime.memory import keep_freed_memory
from lightning_align.scoring.losses import sigmoid_loss
from lightning_align.scoring.ratios import log_ratios, pair_metrics
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch

PROMPT, ANSWER, VOCABULARY = 512, 128, 32_000


def long_pairs(count: int, vocabulary: int) -> list[common.Pair]:
    """Random pairs with long prompts."""
    generator = random.Random(0)

    def ids(number: int) -> list[int]:
        return [generator.randrange(2, vocabulary) for _ in range(number)]

    return [common.Pair(ids(PROMPT), ids(ANSWER), ids(ANSWER)) for _ in range(count)]


def ours(vocabulary: int, batches: list[PreferenceBatch], shared: bool, recompute: bool = False) -> peer_trl.Step:
    """Our step, as `DPOModule` computes it."""
    keep_freed_memory()
    policy = peer_trl.ours(vocabulary, recompute)
    reference = frozen_copy(policy)
    policy.train()
    update = peer_trl.updates(policy)

    def step(number: int) -> float:
        both = concatenate(batches[number])
        if shared:
            both["prefixes"] = plan_prefixes(both)
        referred, scored = reference.logprobs(policy, both), response_logprobs(policy, both)
        ratios = log_ratios(scored, referred)
        loss = sigmoid_loss(ratios, beta=BETA).mean()
        loss.backward()
        update()
        for values in pair_metrics(scored, ratios, beta=BETA).values():
            values.mean().item()
        return float(loss)

    return step


SIDES: dict[str, Callable[[int, list[PreferenceBatch]], peer_trl.Step]] = {
    "TRL": functools.partial(peer, stored=False),
    "separate": functools.partial(ours, shared=False),
    "shared": functools.partial(ours, shared=True),
    "shared, recomputed": functools.partial(ours, shared=True, recompute=True),
}


def report(path: str | None, size: int, rounds: int) -> None:
    """Print the section of one kind of pairs."""
    count = (1 + rounds) * size
    pairs = long_pairs(count, VOCABULARY) if path is None else common.file_pairs(path, count, VOCABULARY)
    batches = common.batches(pairs, size)
    saved = common.median(plan_prefixes(concatenate(batch)).saved for batch in batches)
    with tempfile.NamedTemporaryFile() as file:
        torch.save(batches, file.name)
        runs = turns.take_turns(__file__, list(SIDES), "--batches", file.name, rounds=rounds)
    data = f"prompts of {PROMPT} tokens and answers of {ANSWER}" if path is None else "pairs from a file"
    common.heading(
        f"A DPO step whose pairs share their prompt: {data}",
        f"The same Llama on all sides: width {peer_trl.WIDTH}, depth {peer_trl.DEPTH}, {peer_trl.HEADS} heads, vocabulary "
        f"{VOCABULARY:,}; {size} pairs per step, a frozen reference, fused AdamW, float32, one thread. {saved:.0%} of the "
        f"tokens of separate rows are saved. Each side has its own process and they take {rounds} steps in turns, after "
        f"one warm-up step. Memory: peak above the interpreter and its imports. {peer_trl.PEER} checkpoints no gradients.",
    )
    theirs, apart = runs["TRL"], runs["separate"]
    rows = []
    for side, run in runs.items():
        rows.append(
            {
                "side": side,
                "CPU s/step (median)": f"{common.median(t.seconds for t in run.timings):.2f}",
                "speed / separate": f"{1 / common.ratio(run.timings, apart.timings):.2f}x",
                "speed / TRL": f"{1 / common.ratio(run.timings, theirs.timings):.2f}x",
                "background load": common.load(run.timings),
                "peak memory, MiB": f"{run.bytes / common.MIB:,.0f}",
                "memory / TRL": f"{run.bytes / theirs.bytes:.2f}",
                "first losses": ", ".join(f"{loss:.6f}" for loss in run.losses[: peer_trl.FIRST_LOSSES]),
            }
        )
    print(common.table(rows))
    least, times = (1.5, 8.0) if path is None else (1.15, None)
    faster = 1 / common.ratio(runs["shared"].timings, apart.timings)
    claims = [common.claim("speed, shared / separate", f"≥ {least:g}x", f"{faster:.2f}x", faster >= least)]
    if times is not None:
        against = 1 / common.ratio(runs["shared"].timings, theirs.timings)
        share = min(run.bytes for side, run in runs.items() if "shared" in side) / theirs.bytes
        claims.append(common.claim("speed, shared / TRL", f"≥ {times:g}x", f"{against:.2f}x", against >= times))
        claims.append(common.claim("memory / TRL, the better of both", "≤ 0.15", f"{share:.2f}", share <= 0.15))
    first = [run.losses[: peer_trl.FIRST_LOSSES] for run in runs.values()]
    gap = max(abs(loss - other) for losses in first for loss, other in zip(losses, first[0], strict=True))
    claims.append(common.claim("difference of first losses", "≤ 1e-5", f"{gap:.1e}", gap <= 1e-5))
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps per side, after one warm-up step")
    parser.add_argument("--pairs", metavar="FILE", help="JSONL with prompt, chosen and rejected; default: long random prompts")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # the peer warns about the settings used here
    if arguments.side:
        turns.serve(functools.partial(SIDES[arguments.side], VOCABULARY, torch.load(arguments.batches)), cpu=True)
    else:
        report(arguments.pairs, arguments.size, arguments.rounds)


if __name__ == "__main__":
    main()
