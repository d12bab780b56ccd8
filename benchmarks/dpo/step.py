"""A DPO step against class `DPO` of x-transformers 2.31.10.

Three sides get the same batches, padding, optimizer and clipping:

- peer: `x_transformers.dpo.DPO` with a `TransformerWrapper`.
- logits: our loss with the same `TransformerWrapper`, which returns only logits.
- PaLM: our loss with our model of the same width, depth and number of heads, which returns hidden states.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper
from x_transformers.dpo import DPO

from benchmarks import common
from lightning_align.dpo.batch import concatenate
from lightning_align.models.palm import PaLM
from lightning_align.references.frozen import frozen_copy
from lightning_align.scoring.losses import sigmoid_loss
from lightning_align.scoring.ratios import log_ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch

VOCABULARY, WIDTH, DEPTH, HEADS, PAIRS = 32_000, 256, 4, 4, 8
LEARNING_RATE, CLIP, BETA = 1e-4, 1.0, 0.1
NUMBER_OF_BATCHES = 8
PEER = f"x-transformers {importlib.metadata.version('x-transformers')}"

Loss = Callable[[PreferenceBatch], Tensor]


def transformer() -> nn.Module:
    """The model of the sides peer and logits."""
    layers = Decoder(
        dim=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        attn_flash=True,
        rotary_pos_emb=True,
        ff_swish=True,
        ff_glu=True,
        ff_no_bias=True,
    )
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=1024, attn_layers=layers, use_abs_pos_emb=False)


def peer() -> tuple[nn.Module, Loss]:
    """Policy and loss of the peer."""
    module = DPO(transformer(), beta=BETA)

    def loss(batch: PreferenceBatch) -> Tensor:
        chosen, rejected = batch["chosen"], batch["rejected"]
        value: Tensor = module(
            chosen["tokens"],
            rejected["tokens"],
            prompt_mask=chosen["mask"] & ~chosen["targets"],
            preferred_seq_mask=chosen["mask"],
            unpreferred_seq_mask=rejected["mask"],
        )
        return value

    return module.policy_model, loss


def ours(policy: nn.Module) -> tuple[nn.Module, Loss]:
    """Any policy with our loss."""
    reference = frozen_copy(policy)

    def loss(batch: PreferenceBatch) -> Tensor:
        both = concatenate(batch)
        ratios = log_ratios(response_logprobs(policy, both), reference.logprobs(policy, both))
        return sigmoid_loss(ratios, beta=BETA).mean()

    return policy, loss


SIDES: dict[str, Callable[[], tuple[nn.Module, Loss]]] = {
    "peer": peer,
    "logits": lambda: ours(transformer()),
    "PaLM": lambda: ours(PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64)),
}


def stepper(side: str) -> Callable[[PreferenceBatch], None]:
    """A training step of a side, with its own model and optimizer."""
    torch.manual_seed(0)
    policy, loss = SIDES[side]()
    optimizer = torch.optim.AdamW(policy.parameters(), LEARNING_RATE)

    def step(batch: PreferenceBatch) -> None:
        loss(batch).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def load_batches(path: str | None) -> list[PreferenceBatch]:
    """Batches of a file, or synthetic ones."""
    count = NUMBER_OF_BATCHES * PAIRS
    if path is None:
        pairs = common.synthetic_pairs(count, VOCABULARY)
    else:
        pairs = common.file_pairs(path, count, VOCABULARY)
    return common.batches(pairs, PAIRS)


def memory(side: str, path: str | None) -> None:
    """Print the peak memory of a side over all batches, above the interpreter and its imports, in bytes."""
    batches = load_batches(path)
    with common.Meter() as meter, common.Memory() as used:
        step = stepper(side)
        for batch in batches:
            step(batch)
    print(json.dumps({"bytes": used.bytes, "others": meter.others}))


def times(rounds: int, path: str | None) -> None:
    """Print the times of all sides, alternating batch by batch."""
    batches = load_batches(path)
    steps = {side: stepper(side) for side in SIDES}
    for step in steps.values():
        for batch in batches[:2]:
            step(batch)
    # Each side has its own iterator over the same batches in the same order.
    iterators: dict[str, Iterator[PreferenceBatch]] = {side: cycle(batches) for side in SIDES}
    turns = {side: partial(lambda s: steps[s](next(iterators[s])), side) for side in SIDES}
    print(json.dumps(common.alternate(turns, rounds)))


def measure(rounds: int, path: str | None, thp: bool) -> dict[str, tuple[list[common.Timing], float, float]]:
    """Timings, peak memory in bytes, and background load during the memory run, by side."""
    pairs = [] if path is None else ["--pairs", path]
    timed = common.in_subprocess(__file__, "--time", "--rounds", str(rounds), *pairs, thp=thp)
    result = {}
    for side in SIDES:
        used = common.in_subprocess(__file__, "--memory", side, *pairs, thp=thp)
        result[side] = [common.Timing(*timing) for timing in timed[side]], used["bytes"], used["others"]
    return result


def report(rounds: int, path: str | None, thp: bool) -> None:
    """Print the section."""
    padding, responses = common.shares(load_batches(path))
    data = "synthetic pairs" if path is None else "pairs from a file"
    common.heading(
        f"A DPO step against {PEER}{', with huge pages' if thp else ''}",
        f"Vocabulary {VOCABULARY:,}, width {WIDTH}, depth {DEPTH}, {HEADS} heads, {PAIRS} pairs per step, AdamW "
        f"{LEARNING_RATE:g}, clip {CLIP}, float32, two threads; {data}: {padding:.0%} of positions are padding, "
        f"{responses:.0%} response tokens. {rounds} alternating rounds after two warm-up steps per side. Memory: peak above "
        f"the interpreter and its imports over {NUMBER_OF_BATCHES} steps, each side in its own process.",
    )
    results = measure(rounds, path, thp)
    peer_timings, peer_bytes, _ = results["peer"]
    rows, speeds = [], {}
    for side, (timings, used, others) in results.items():
        speeds[side] = 1 / common.ratio(timings, peer_timings)
        seconds = common.median(t.seconds for t in timings)
        rows.append(
            {
                "side": side,
                "s/step (median)": f"{seconds:.2f}",
                "pairs/s": f"{PAIRS / seconds:.2f}",
                "speedup over peer": f"{speeds[side]:.2f}x",
                "background load": common.load(timings),
                "peak memory, MiB": f"{used / common.MIB:,.0f}",
                "memory / peer": f"{used / peer_bytes:.2f}",
                "background load (memory)": f"{others:.2f}",
            }
        )
    print(common.table(rows))
    palm_memory = results["PaLM"][1] / peer_bytes
    logits, palm = speeds["logits"], speeds["PaLM"]
    claims = [
        common.claim("speed of our loss on the same model", "≥ 1.2x", f"{logits:.2f}x", logits >= 1.2),
        common.claim("speed with our PaLM", "≥ 2.5x", f"{palm:.2f}x", palm >= 2.5),
        common.claim("memory with our PaLM", "≤ 0.45", f"{palm_memory:.2f}", palm_memory <= 0.45),
    ]
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--pairs", metavar="FILE", help="JSONL with prompt, chosen and rejected; default: synthetic pairs")
    parser.add_argument("--thp", action="store_true", help="use huge pages on all sides")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.memory:
        memory(arguments.memory, arguments.pairs)
    elif arguments.time:
        times(arguments.rounds, arguments.pairs)
    else:
        report(arguments.rounds, arguments.pairs, arguments.thp)


if __name__ == "__main__":
    main()
