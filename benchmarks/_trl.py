"""What the comparisons with TRL share: the model of both sides, TRL's settings, and the tables."""

import argparse
import functools
import importlib.metadata
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _common as common
import _turns
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_align.models.pretrained import PretrainedLM
from lightning_align.types import PreferenceBatch

WIDTH, DEPTH, HEADS = 256, 4, 4
LEARNING_RATE, CLIP = 1e-4, 1.0
PEER = f"TRL {importlib.metadata.version('trl')}"
FIRST_LOSSES = 3

Step = Callable[[int], float]
"""The training step of a number: its loss."""


def configuration(vocabulary: int) -> LlamaConfig:
    """The model of both sides."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )


def llama(vocabulary: int) -> LlamaForCausalLM:
    """The peer's model, with the same weights every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(configuration(vocabulary))


def ours(vocabulary: int, recompute: bool = False) -> PretrainedLM:
    """The same model as ours, perhaps with activations that are computed again in the backward pass."""
    torch.manual_seed(0)
    return PretrainedLM(config=configuration(vocabulary).to_dict(), gradient_checkpointing=recompute)


def tokenizer() -> PreTrainedTokenizerFast:
    """One that TRL's trainers ask for; nothing is encoded with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "<pad>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def settings(rows: int) -> dict[str, Any]:
    """Settings of TRL's trainers: what both sides do, and no gradient checkpointing, which is on by default and slower."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows,
        "max_length": 1024,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }


def updates(model: nn.Module) -> Callable[[], None]:
    """Clipping and AdamW, fused as TRL's default is, for both sides."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return update


def compare(
    script: str,
    sides: dict[str, Callable[[int, list[PreferenceBatch]], Step]],
    *,
    title: str,
    rows: int,
    unit: str,
    bars: Callable[[int], tuple[float, float | None]],
    shares: Callable[[Sequence[PreferenceBatch]], tuple[float, float]] = common.shares,
) -> None:
    """Parse the command line, let the sides step in turns, print the section.

    Args:
        script: path of the caller.
        sides: what makes each side's step, from the vocabulary and the batches; "peer..." are TRL's, "ours..." ours.
        title: what is compared.
        rows: number of pairs in a batch.
        unit: what is counted a second, of which a batch has ``rows``.
        bars: from the vocabulary the least speed over the peer and the greatest memory.
        shares: of padding and of responses in what a step is given.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side, after one to warm up")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--pairs", metavar="FILE", help="JSONL with prompt, chosen and rejected; else synthetic pairs")
    parser.add_argument("--thp", action="store_true", help="all sides with huge pages from malloc")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # of the peer, about settings of ours
    vocabulary, rounds = arguments.vocabulary, arguments.rounds
    if arguments.side:
        return _turns.serve(functools.partial(sides[arguments.side], vocabulary, torch.load(arguments.batches)))
    count = (1 + rounds) * rows
    if arguments.pairs is None:
        pairs, data = common.synthetic_pairs(count, vocabulary), "synthetic pairs"
    else:
        pairs, data = common.file_pairs(arguments.pairs, count, vocabulary), "pairs of a file"
    batches = common.batches(pairs, rows)
    padding, responses = shares(batches)
    with tempfile.NamedTemporaryFile() as file:
        torch.save(batches, file.name)
        words = ("--vocabulary", str(vocabulary), "--batches", file.name)
        runs = _turns.take_turns(script, list(sides), *words, rounds=rounds, thp=arguments.thp)
    common.heading(
        f"{title} on a Llama against {PEER}, vocabulary {vocabulary:,}"
        f"{', huge pages from malloc on both sides' if arguments.thp else ''}",
        f"One Llama for both, width {WIDTH}, depth {DEPTH}, {HEADS} heads, {rows} {unit} a step, fused AdamW "
        f"{LEARNING_RATE:g}, clip {CLIP}, float32, two threads; {data}: {padding:.0%} of the positions are padding, "
        f"{responses:.0%} response. Each side in a process of its own, {rounds} steps each on the same batches in turns, after "
        "one to warm up. Memory: resident above the interpreter with its imports. TRL with its fused output layer, gradient "
        "checkpointing off.",
    )
    table, claims = [], []
    least, most = bars(vocabulary)
    for side, run in runs.items():
        against = runs.get(side.replace("ours", "peer"), runs["peer"])
        speed = 1 / common.ratio(run.timings, against.timings)
        share = run.bytes / against.bytes
        seconds = common.median(t.seconds for t in run.timings)
        table.append(
            {
                "side": side,
                "s/step (median)": f"{seconds:.2f}",
                f"{unit}/s": f"{rows / seconds:.2f}",
                "speed over the peer": f"{speed:.2f}x",
                "load of others": common.load(run.timings),
                "peak MiB": f"{run.bytes / common.MIB:,.0f}",
                "over the peer": f"{share:.2f}",
                "first losses": ", ".join(f"{loss:.6f}" for loss in run.losses[:FIRST_LOSSES]),
            }
        )
        if run is against:
            continue
        gap = max(abs(a - b) for a, b in zip(run.losses[:FIRST_LOSSES], against.losses[:FIRST_LOSSES], strict=True))
        claims.append(common.claim(f"{side}: speed", f"≥ {least:g}x", f"{speed:.2f}x", speed >= least))
        if most is not None:
            claims.append(common.claim(f"{side}: memory", f"≤ {most:g}", f"{share:.2f}", share <= most))
        claims.append(common.claim(f"{side}: difference of the first losses", "≤ 1e-5", f"{gap:.1e}", gap <= 1e-5))
    print(common.table(table))
    print(common.table(claims))
