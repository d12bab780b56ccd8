"""Generation with weights of 8 bits: the time of a token, and how far the model is from the one with its own weights.

A token is a step of the decoder with a filled cache; what the weights take to be rounded is timed apart. With ``--model`` and
``--texts``, both models score real texts: the loss of each, and the KL from the model to the one with 8 bits.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from lightning_align.generation.decoder import make_decoder
from lightning_align.generation.int8 import Int8Weights
from lightning_align.generation.packing import packed_linears
from lightning_align.generation.sampler import evaluating
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM

DEPTH, VOCABULARY, TOKENS, LONGEST = 12, 8_192, 8, 160


@contextmanager
def sides(width: int, rows: int, rounds: int) -> Iterator[tuple[dict[str, Callable[[], None]], float]]:
    """Steps of a decoder with each kind of weights, and the CPU seconds that rounding them takes."""
    torch.manual_seed(0)
    model = PaLM(num_tokens=VOCABULARY, dim=width, depth=DEPTH, heads=width // 64, dim_head=64).eval()
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16(), "int8": copy.deepcopy(model)}
    prompt = torch.randint(2, VOCABULARY, (64,)).tolist()
    with ExitStack() as stack, torch.no_grad():
        rounding, made = 0.0, {}
        for name, own in models.items():
            stack.enter_context(evaluating(own))
            begin = time.process_time()
            stack.enter_context(packed_linears(own, Int8Weights() if name == "int8" else None))
            if name == "int8":
                rounding = time.process_time() - begin
            decoder: Any = make_decoder(own, [prompt] * rows, limit=TOKENS * (rounds + 3), copies=1, device=torch.device("cpu"))
            decoder.start(1)

            def run(decoder: Any = decoder) -> None:
                for token in range(TOKENS):
                    decoder.step(torch.full((rows,), token + 2))

            run()  # a warm-up
            made[name] = run
        yield made, rounding


def speed(rounds: int, widths: list[int]) -> None:
    """Print the time of a token."""
    common.heading(
        "Generation with weights of 8 bits",
        f"PaLM, depth {DEPTH}, vocabulary {VOCABULARY:,}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} "
        f"threads; {rounds} alternating rounds of {TOKENS} tokens per row.",
    )
    table, claims = [], []
    for width in widths:
        for rows in (1, 4, 16):
            with sides(width, rows, rounds) as (made, rounding):
                timings = common.alternate(made, rounds, cpu=True)
            for name in made:
                gain = 1 / common.ratio(timings[name], timings["bfloat16"])
                table.append(
                    {
                        "width": f"{width:,}",
                        "rows": str(rows),
                        "weights": name,
                        "CPU ms/token (median)": f"{1e3 * common.median(t.seconds for t in timings[name]) / TOKENS:.1f}",
                        "speed / bfloat16": f"{gain:.2f}x",
                        "rounding, CPU s": f"{rounding:.2f}" if name == "int8" else "",
                        "background load": common.load(timings[name]),
                    }
                )
                if name == "int8" and rows == 1:
                    what = f"speed of int8 over bfloat16, width {width:,}, one row"
                    claims.append(common.claim(what, "≥ 1.8x", f"{gain:.2f}x", gain >= 1.8))
    print(common.table(table))
    print(common.table(claims))


def gap(name: str, texts: Path, count: int) -> None:
    """Print how far the model with 8 bits is from the model, on texts."""
    from transformers import AutoTokenizer

    model = PretrainedLM(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = [tokenizer(row["prompt"] + "\n" + row["response"])["input_ids"][:LONGEST] for row in common.read_rows(texts, count)]

    def score(tokens: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens]))[0, :-1].float().log_softmax(-1)

    found = []
    kept = Int8Weights()
    for tokens in ids:
        plain = score(tokens)
        with packed_linears(model, kept):
            rounded = score(tokens)
        after = torch.tensor(tokens[1:])[:, None]
        kl = (plain.exp() * (plain - rounded)).sum(-1)
        top = (plain.argmax(-1) == rounded.argmax(-1)).float()
        found.append(torch.stack([-plain.gather(1, after)[:, 0], -rounded.gather(1, after)[:, 0], kl, top]))
    values = torch.cat(found, 1)
    before, later, kl, top = values.mean(1).tolist()
    row = {
        "tokens": f"{values.shape[1]:,}",
        "loss, nats per token": f"{before:.4f}",
        "loss with int8": f"{later:.4f} ({later - before:+.4f})",
        "KL, nats per token": f"{kl:.4f} (max {values[2].max():.3f})",
        "same most likely token": f"{top:.1%}",
    }
    print(common.table([{"model": Path(name).name, **row}]))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[1_024])
    parser.add_argument("--model", help="a folder of transformers, for the gap")
    parser.add_argument("--texts", type=Path, help="JSONL of {prompt, response}, for the gap")
    parser.add_argument("--count", type=int, default=32, help="texts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    speed(arguments.rounds, arguments.widths)
    if arguments.model and arguments.texts:
        gap(arguments.model, arguments.texts, arguments.count)


if __name__ == "__main__":
    main()
