"""A DPO step whose pairs share their prompt, against our step on separate rows and against `DPOTrainer` of TRL 1.16.

All sides train the same Llama on the same pairs, with a frozen reference. ``recomputed`` is with gradient checkpointing. The
pairs are those of a file, or random ones with prompts of 512 tokens and answers of 128. With ``--lora``, our sides alone
train LoRA adapters of a wider Llama, whose reference is the model without them.
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
from lightning_align.models.lora import LoRAConfig, add_lora, train_only
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.shared_rows import plan_prefixes
from lightning_align.references.frozen import AdaptersOff, frozen_copy
from lightning_align.runtime.memory import keep_freed_memory
from lightning_align.scoring.losses import sigmoid_loss
from lightning_align.scoring.ratios import log_ratios, pair_metrics
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch

PROMPT, ANSWER, VOCABULARY = 512, 128, 32_000
LORA_WIDTH, LORA_DEPTH, LORA_HEADS, RANK = 576, 6, 9, 16


def long_pairs(count: int, vocabulary: int) -> list[common.Pair]:
    """Random pairs with long prompts."""
    generator = random.Random(0)

    def ids(number: int) -> list[int]:
        return [generator.randrange(2, vocabulary) for _ in range(number)]

    return [common.Pair(ids(PROMPT), ids(ANSWER), ids(ANSWER)) for _ in range(count)]


def adapted(vocabulary: int) -> PretrainedLM:
    """A Llama of the width of SmolLM2-135M, of which LoRA adapters train."""
    torch.manual_seed(0)
    sizes = {"hidden_size": LORA_WIDTH, "intermediate_size": 4 * LORA_WIDTH, "num_hidden_layers": LORA_DEPTH}
    heads = {"num_attention_heads": LORA_HEADS, "num_key_value_heads": LORA_HEADS}
    model = PretrainedLM(config={**peer_trl.configuration(vocabulary).to_dict(), **sizes, **heads, "head_dim": 64})
    add_lora(model, LoRAConfig(rank=RANK))
    train_only(model, "default")
    return model


def ours(
    vocabulary: int, batches: list[PreferenceBatch], shared: bool, recompute: bool = False, lora: bool = False
) -> peer_trl.Step:
    """Our step, as `DPOModule` computes it."""
    keep_freed_memory()
    policy = adapted(vocabulary) if lora else peer_trl.ours(vocabulary, recompute)
    reference = AdaptersOff() if lora else frozen_copy(policy)
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
LORA_SIDES: dict[str, Callable[[int, list[PreferenceBatch]], peer_trl.Step]] = {
    "separate": functools.partial(ours, shared=False, lora=True),
    "shared": functools.partial(ours, shared=True, lora=True),
}


def report(path: str | None, size: int, rounds: int, lora: bool) -> None:
    """Print the section of one kind of pairs."""
    count = (1 + rounds) * size
    pairs = long_pairs(count, VOCABULARY) if path is None else common.file_pairs(path, count, VOCABULARY)
    batches = common.batches(pairs, size)
    saved = common.median(plan_prefixes(concatenate(batch)).saved for batch in batches)
    with tempfile.NamedTemporaryFile() as file:
        torch.save(batches, file.name)
        words = ("--batches", file.name, *(["--lora"] if lora else []))
        runs = turns.take_turns(__file__, list(LORA_SIDES if lora else SIDES), *words, rounds=rounds)
    data = f"prompts of {PROMPT} tokens and answers of {ANSWER}" if path is None else "pairs from a file"
    width, depth, heads = (LORA_WIDTH, LORA_DEPTH, LORA_HEADS) if lora else (peer_trl.WIDTH, peer_trl.DEPTH, peer_trl.HEADS)
    trained = f"LoRA of rank {RANK}, of which the model alone is the reference" if lora else "a frozen reference"
    common.heading(
        f"A DPO step whose pairs share their prompt: {data}{', LoRA' if lora else ''}",
        f"The same Llama on all sides: width {width}, depth {depth}, {heads} heads, vocabulary "
        f"{VOCABULARY:,}; {size} pairs per step, {trained}, fused AdamW, float32, one thread. {saved:.0%} of the "
        f"tokens of separate rows are saved. Each side has its own process and they take {rounds} steps in turns, after "
        f"one warm-up step. Memory: peak above the interpreter and its imports."
        + ("" if lora else f" {peer_trl.PEER} checkpoints no gradients."),
    )
    theirs, apart = runs.get("TRL"), runs["separate"]
    rows = []
    for side, run in runs.items():
        rows.append(
            {
                "side": side,
                "CPU s/step (median)": f"{common.median(t.seconds for t in run.timings):.2f}",
                "speed / separate": f"{1 / common.ratio(run.timings, apart.timings):.2f}x",
                "speed / TRL": "" if theirs is None else f"{1 / common.ratio(run.timings, theirs.timings):.2f}x",
                "background load": common.load(run.timings),
                "peak memory, MiB": f"{run.bytes / common.MIB:,.0f}",
                "memory / TRL": "" if theirs is None else f"{run.bytes / theirs.bytes:.2f}",
                "first losses": ", ".join(f"{loss:.6f}" for loss in run.losses[: peer_trl.FIRST_LOSSES]),
            }
        )
    print(common.table(rows))
    least = 1.5 if path is None else 1.15
    faster = 1 / common.ratio(runs["shared"].timings, apart.timings)
    claims = [common.claim("speed, shared / separate", f"≥ {least:g}x", f"{faster:.2f}x", faster >= least)]
    if theirs is not None and path is None:
        against = 1 / common.ratio(runs["shared"].timings, theirs.timings)
        share = min(run.bytes for side, run in runs.items() if "shared" in side) / theirs.bytes
        claims.append(common.claim("speed, shared / TRL", "≥ 8x", f"{against:.2f}x", against >= 8))
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
    parser.add_argument("--lora", action="store_true", help="LoRA on a wider Llama, without TRL")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # the peer warns about the settings used here
    if arguments.side:
        sides = LORA_SIDES if arguments.lora else SIDES
        turns.serve(functools.partial(sides[arguments.side], VOCABULARY, torch.load(arguments.batches)), cpu=True)
    else:
        report(arguments.pairs, arguments.size, arguments.rounds, arguments.lora)


if __name__ == "__main__":
    main()
