"""Continuous batching: tokens per second against batches that end together.

Both sides are the sampler of this package, and give the same tokens. With fixed batches, rows that ended leave, but the next
prompts start when the whole batch has ended. With continuous batching, they start at once. Two kinds of lengths:

- ends at random: one of many end-of-sequence ids is drawn with the same probability at each step. Lengths are geometric.
- lengths of the rows: each response is as long as the response of its row.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.models.palm import PaLM

VOCABULARY, WIDTH, DEPTH, HEADS = 8_192, 256, 4, 4
Rows = tuple[list[list[int]], list[int]]


def read_rows(path: str, count: int) -> Rows:
    """Tokenize the prompts of a file with a vocabulary that is trained on them. Returns prompts and response lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rows = common.read_rows(path, count)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)
    tokenizer.train_from_iterator([text for row in rows for text in (row["prompt"], row["response"])], trainer)
    prompts, responses = (
        [e.ids for e in tokenizer.encode_batch([row[name] for row in rows])] for name in ("prompt", "response")
    )
    return prompts, [len(response) for response in responses]


def make_rows(count: int) -> Rows:
    """Draw random prompts and response lengths, with about the lengths of grade-school problems."""
    generator = np.random.default_rng(0)
    lengths = [
        np.exp(generator.normal(mean, spread, count)).astype(int).clip(8, 400) for mean, spread in ((3.9, 0.4), (4.5, 0.45))
    ]
    return [generator.integers(0, VOCABULARY, n).tolist() for n in lengths[0]], lengths[1].tolist()


def run(model: PaLM, rows: Rows, config: GenerationConfig, ends: int, *, continuous: bool) -> list[list[Generation]]:
    """Answer all prompts. Without end-of-sequence ids, each response is as long as that of its row."""
    prompts, lengths = rows
    limits = None if ends else lengths
    return generate(model, prompts, config, eos_id=list(range(ends)) or None, limits=limits, continuous=continuous)


def quartiles(values: Sequence[int]) -> str:
    """Format the smallest, the quartiles and the largest value."""
    return " / ".join(f"{value:.0f}" for value in (min(values), *statistics.quantiles(values, n=4), max(values)))


def report(rows: Rows, source: str, kinds: Sequence[str], batch_sizes: Sequence[int], mean: int, rounds: int) -> None:
    """Print the section."""
    torch.manual_seed(0)
    model = PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64).eval()
    prompts, _ = rows
    common.heading(
        "Continuous batching",
        f"{len(prompts)} prompts of {source}, {statistics.mean(map(len, prompts)):.0f} tokens on average, up to 512 new "
        f"tokens, temperature 1, vocabulary {VOCABULARY:,}, width {WIDTH}, depth {DEPTH}, float32, "
        f"{torch.get_num_threads()} threads, random weights. Ends at random have a mean of {mean} tokens. Lengths: minimum, "
        f"quartiles, maximum. {rounds} alternating rounds.",
    )
    table: list[dict[str, Any]] = []
    claims = []
    for kind in kinds:
        name, ends = {"random": ("ends at random", VOCABULARY // mean), "rows": ("lengths of the rows", 0)}[kind]
        for batch_size in batch_sizes:
            config = GenerationConfig(max_new_tokens=512, batch_size=batch_size)
            answers: dict[str, list[list[Generation]]] = {}

            def side(label: str, continuous: bool, config: Any = config, ends: int = ends, answers: Any = answers) -> Any:
                def play() -> None:
                    answers[label] = run(model, rows, config, ends, continuous=continuous)

                return play

            timings = common.alternate({"fixed": side("fixed", False), "continuous": side("continuous", True)}, rounds)
            lengths = [len(answer.logprobs) for row in answers["fixed"] for answer in row]
            same = sum(one == two for one, two in zip(*answers.values(), strict=True))
            speed = 1 / common.ratio(timings["continuous"], timings["fixed"])
            table.append(
                {
                    "lengths": f"{name}: {quartiles(lengths)}",
                    "batch": batch_size,
                    **{
                        f"{label}, tokens/s": f"{sum(lengths) / common.median(t.seconds for t in timings[label]):,.0f}"
                        for label in ("fixed", "continuous")
                    },
                    "ratio": f"{speed:.2f}x",
                    "equal responses": f"{same} of {len(prompts)}",
                    "background load": common.load(timings["fixed"] + timings["continuous"]),
                }
            )
            print(table[-1], file=sys.stderr, flush=True)
            if ends:
                claims.append(common.claim(f"{name}, batch {batch_size}: speed", "≥ 1.5x", f"{speed:.2f}x", speed >= 1.5))
    print(common.table(table))
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="a file of rows with `prompt` and `response`, such as GSM8K. Default is random rows")
    parser.add_argument("--lengths", nargs="+", choices=["random", "rows"], default=["random", "rows"], help="kinds of lengths")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--mean", type=int, default=64, help="mean length of responses that end at random, in tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = make_rows(arguments.prompts) if arguments.rows is None else read_rows(arguments.rows, arguments.prompts)
    source = "random ids" if arguments.rows is None else Path(arguments.rows).parent.name
    report(rows, source, arguments.lengths, arguments.batch_sizes, arguments.mean, arguments.rounds)


if __name__ == "__main__":
    main()
