"""What the comparisons with TRL share: the model, TRL's settings, and the tables."""

import argparse
import functools
import importlib.metadata
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import common
from benchmarks.common import turns
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.types import PreferenceBatch

WIDTH, DEPTH, HEADS = 256, 4, 4
LEARNING_RATE, CLIP = 1e-4, 1.0
PEER = f"TRL {importlib.metadata.version('trl')}"
FIRST_LOSSES = 3

Step = Callable[[int], float]
"""Runs the training step with a given number and returns its loss."""


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
    """The same model in our wrapper, optionally with gradient checkpointing."""
    torch.manual_seed(0)
    return PretrainedLM(config=configuration(vocabulary).to_dict(), gradient_checkpointing=recompute)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer, which TRL's trainers require. It encodes nothing here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "<pad>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def settings(rows: int) -> dict[str, Any]:
    """Settings of TRL's trainers. Gradient checkpointing, on by default and slower, is off."""
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
    """Clipping and fused AdamW, TRL's default, for both sides."""
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
    description: str | None,
    rows: int,
    unit: str,
    bars: Callable[[int], tuple[float, float | None]],
    shares: Callable[[Sequence[PreferenceBatch]], tuple[float, float]] = common.shares,
) -> None:
    """Parse the command line, let the sides step in turns, and print the section.

    Args:
        script: path of the calling script.
        sides: functions that make each side's step from the vocabulary and the batches. Names start with "peer" (TRL) or
            "ours".
        title: what is compared.
        description: text for ``--help``.
        rows: number of pairs in a batch.
        unit: what the throughput counts; a batch has ``rows`` of them.
        bars: required speedup and memory relative to the peer, by vocabulary.
        shares: function for the shares of padding and response tokens in the batches.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per side, after one warm-up step")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--pairs", metavar="FILE", help="JSONL with prompt, chosen and rejected; default: synthetic pairs")
    parser.add_argument("--thp", action="store_true", help="use huge pages on all sides")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # the peer warns about the settings used here
    vocabulary, rounds = arguments.vocabulary, arguments.rounds
    if arguments.side:
        return turns.serve(functools.partial(sides[arguments.side], vocabulary, torch.load(arguments.batches)))
    count = (1 + rounds) * rows
    if arguments.pairs is None:
        pairs, data = common.synthetic_pairs(count, vocabulary), "synthetic pairs"
    else:
        pairs, data = common.file_pairs(arguments.pairs, count, vocabulary), "pairs from a file"
    batches = common.batches(pairs, rows)
    padding, responses = shares(batches)
    with tempfile.NamedTemporaryFile() as file:
        torch.save(batches, file.name)
        words = ("--vocabulary", str(vocabulary), "--batches", file.name)
        runs = turns.take_turns(script, list(sides), *words, rounds=rounds, thp=arguments.thp)
    common.heading(
        f"{title} on a Llama against {PEER}, vocabulary {vocabulary:,}{', with huge pages' if arguments.thp else ''}",
        f"Both sides train the same Llama: width {WIDTH}, depth {DEPTH}, {HEADS} heads; {rows} {unit} per step, fused AdamW "
        f"{LEARNING_RATE:g}, clip {CLIP}, float32, two threads; {data}: {padding:.0%} of positions are padding, "
        f"{responses:.0%} response tokens. Each side has its own process. The sides take {rounds} steps in turns on the same "
        "batches, after one warm-up step. Memory: peak above the interpreter and its imports. TRL uses its fused output layer; "
        "gradient checkpointing is off.",
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
                "speedup over peer": f"{speed:.2f}x",
                "background load": common.load(run.timings),
                "peak memory, MiB": f"{run.bytes / common.MIB:,.0f}",
                "memory / peer": f"{share:.2f}",
                "first losses": ", ".join(f"{loss:.6f}" for loss in run.losses[:FIRST_LOSSES]),
            }
        )
        if run is against:
            continue
        gap = max(abs(a - b) for a, b in zip(run.losses[:FIRST_LOSSES], against.losses[:FIRST_LOSSES], strict=True))
        claims.append(common.claim(f"{side}: speed", f"≥ {least:g}x", f"{speed:.2f}x", speed >= least))
        if most is not None:
            claims.append(common.claim(f"{side}: memory", f"≤ {most:g}", f"{share:.2f}", share <= most))
        claims.append(common.claim(f"{side}: difference of first losses", "≤ 1e-5", f"{gap:.1e}", gap <= 1e-5))
    print(common.table(table))
    print(common.table(claims))
