"""Prompt lookup at batch 1: what a pass over guesses costs, and on a real model how many guesses are right and what they save.

A pass reads the last token and the guesses together. It pays if the guesses that are kept save more than it costs above a pass
of one token. With ``--model`` and ``--prompts``, a model of transformers answers prompts with guesses and without, greedily and
by sampling. Products of one row with weights of 8 and 4 bits, by those routines of torch that round only the weights, are timed
too, because they would serve the same end.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from lightning_align.data.encode import encode_rows
from lightning_align.data.ledger import Ledger
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.generation.decoder import _CachedDecoder, make_decoder
from lightning_align.generation.ends import Ends
from lightning_align.generation.packing import packed_linears
from lightning_align.generation.sampler import Generation, GenerationConfig, evaluating, generate
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM

WIDTH, DEPTH, HEADS, VOCABULARY = 1_024, 12, 16, 8_192
GUESSES, MOST = (1, 2, 4, 8), 4
TOKENS = 8
"""Tokens or passes per timing."""
GROUP = 32
"""Weights of 4 bits with one scale."""


def passes(rounds: int) -> None:
    """Print the cost of a pass by the number of guesses."""
    torch.manual_seed(0)
    model = PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64).eval()
    prompt = torch.randint(2, VOCABULARY, (64,)).tolist()
    with evaluating(model), packed_linears(model), torch.no_grad():
        decoder: Any = make_decoder(model, [prompt], limit=64, copies=1, device=torch.device("cpu"))
        decoder.start(1)

        # A warm-up, in which the weights are packed.
        decoder.ahead(torch.arange(3) + 2)
        decoder.rewind(3)

        def one() -> None:
            for token in range(TOKENS):
                decoder.step(torch.tensor([token + 2]))
            decoder.rewind(TOKENS)

        def ahead(guesses: int) -> Callable[[], None]:
            def run() -> None:
                for _ in range(TOKENS):
                    decoder.ahead(torch.arange(1 + guesses) + 2)
                    decoder.rewind(1 + guesses)

            return run

        timings = common.alternate({"0": one, **{str(number): ahead(number) for number in GUESSES}}, rounds, cpu=True)
    common.heading(
        "Prompt lookup: the cost of a pass",
        f"PaLM, batch 1, width {WIDTH:,}, depth {DEPTH}, vocabulary {VOCABULARY:,}, {torch.get_num_threads()} threads; "
        f"{rounds} alternating rounds of {TOKENS} passes. A pass pays if more guesses of it are kept than in the last column.",
    )
    rows = []
    for number in map(str, (0, *GUESSES)):
        cost = common.ratio(timings[number], timings["0"])
        rows.append(
            {
                "guesses": number,
                "CPU ms/pass (median)": f"{1e3 * common.median(t.seconds for t in timings[number]) / TOKENS:.1f}",
                "pass / one token": f"{cost:.2f}",
                "kept guesses to break even": f"{cost - 1:.2f}",
                "background load": common.load(timings[number]),
            }
        )
    print(common.table(rows))


def products(rounds: int) -> None:
    """Print the time of a product of one row with weights of several kinds."""
    torch.manual_seed(0)
    weights = [torch.randn(4 * WIDTH, WIDTH) for _ in range(8)]  # more than the cache holds
    x = torch.randn(1, WIDTH)
    narrow = [weight.bfloat16() for weight in weights]
    scales = [weight.abs().amax(1) / 127 for weight in weights]
    bytes_ = [(weight / scale[:, None]).round().to(torch.int8) for weight, scale in zip(weights, scales, strict=True)]

    nibbles = []
    for weight in weights:
        groups = weight.view(4 * WIDTH, WIDTH // GROUP, GROUP)
        step = groups.abs().amax(2) / 7
        packed = torch._convert_weight_to_int4pack_for_cpu(
            (groups / step[..., None]).round().add(8).view(4 * WIDTH, WIDTH).int(), 1
        )
        nibbles.append((packed, torch.stack([step, torch.zeros_like(step)], 2).transpose(0, 1).contiguous().bfloat16()))

    def each(product: Callable[[int], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(8):
                for number in range(len(weights)):
                    product(number)

        return run

    half = [scale.bfloat16() for scale in scales]
    four = torch.ops.aten._weight_int4pack_mm_for_cpu
    kinds: dict[str, Callable[[int], Tensor]] = {
        "float32": lambda i: F.linear(x, weights[i]),
        "bfloat16": lambda i: F.linear(x.bfloat16(), narrow[i]),
        "int8, bfloat16 rows": lambda i: torch._weight_int8pack_mm(x.bfloat16(), bytes_[i], half[i]),
        "int8, float32 rows": lambda i: torch._weight_int8pack_mm(x, bytes_[i], scales[i]),
        f"int4 in groups of {GROUP}, bfloat16 rows": lambda i: four(x.bfloat16(), nibbles[i][0], GROUP, nibbles[i][1]),
    }
    exact = F.linear(x, weights[0])
    errors = {name: float((product(0) - exact).norm() / exact.norm()) for name, product in kinds.items()}
    timings = common.alternate({name: each(product) for name, product in kinds.items()}, rounds, cpu=True)
    common.heading(
        "Products of one row with int8 and int4 weights",
        f"(1, {WIDTH:,}) with ({4 * WIDTH:,}, {WIDTH:,}), {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, {rounds} alternating rounds.",
    )
    rows = [
        {
            "weights": name,
            "CPU ms (median)": f"{1e3 * common.median(t.seconds for t in timings[name]) / 64:.2f}",
            "speed / bfloat16": f"{1 / common.ratio(timings[name], timings['bfloat16']):.2f}x",
            "relative error": f"{errors[name]:.1%}",
            "background load": common.load(timings[name]),
        }
        for name in kinds
    ]
    print(common.table(rows))


def answers(name: str, prompts: Path, count: int, new: int, rounds: int) -> None:
    """Print what guesses save on the answers of a real model."""
    model: Any = PretrainedLM(name).eval()
    tokenizer = load_tokenizer(name)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in common.read_rows(prompts, count)]
    encoded = encode_rows(
        [Row({"messages": messages}, f"prompt {number}") for number, messages in enumerate(asked)],
        tokenizer=tokenizer,
        ledger=Ledger("prompts"),
        accepted=("messages",),
        max_length=4_096,
        truncation="keep_end",
        mask_turns="last_turn",
        prompts_only=True,
    )
    rows = [[int(token) for token in row.sides[0].tokens[: row.num_prompt]] for row in encoded]
    common.heading(
        "Prompt lookup: answers of a real model",
        f"{Path(name).name}, {count} prompts of {prompts.name} one at a time, {new} new tokens at most, up to {MOST} guesses, "
        f"float32, {torch.get_num_threads()} threads; {rounds} alternating rounds.",
    )
    table = []
    for label, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7)):
        found: dict[int, list[list[Generation]]] = {}
        counts = {"passes": 0, "guessed": 0, "dropped": 0}
        ahead, rewind = _CachedDecoder.ahead, _CachedDecoder.rewind

        def counted(self: _CachedDecoder, tokens: Tensor, ahead: Any = ahead, counts: Any = counts) -> Tensor:
            counts["guessed"] += len(tokens) - 1
            logits: Tensor = ahead(self, tokens)
            return logits

        def dropped(self: _CachedDecoder, number: int, rewind: Any = rewind, counts: Any = counts) -> None:
            counts["dropped"] += number
            rewind(self, number)

        def side(most: int, temperature: float = temperature, found: Any = found) -> Callable[[], None]:
            config = GenerationConfig(max_new_tokens=new, temperature=temperature, batch_size=1, prompt_lookup=most)

            def run() -> None:
                found[most] = generate(model, rows, config, ends=Ends.of(tokenizer=tokenizer, model=model, config=config))

            return run

        with patch.object(_CachedDecoder, "ahead", counted), patch.object(_CachedDecoder, "rewind", dropped):
            timings = common.alternate({"without": side(0), "with": side(MOST)}, rounds, cpu=True)
        tokens = sum(len(answer.tokens) for each in found[MOST] for answer in each)
        kept = counts["guessed"] - counts["dropped"]
        same = sum(one == two for one, two in zip(found[0], found[MOST], strict=True))
        table.append(
            {
                "drawn": label,
                "tokens": str(tokens),
                "kept / guessed": f"{kept / max(1, counts['guessed']):.0%}",
                "kept / tokens": f"{kept / rounds / max(1, tokens):.0%}",
                "CPU s without": f"{common.median(t.seconds for t in timings['without']):.1f}",
                "CPU s with": f"{common.median(t.seconds for t in timings['with']):.1f}",
                "speed with / without": f"{1 / common.ratio(timings['with'], timings['without']):.2f}x",
                "equal answers": f"{same} of {count}",
            }
        )
    print(common.table(table))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="a folder, hub name or GGUF file; then only its answers are measured")
    parser.add_argument("--prompts", type=Path, help="JSONL with `prompt`")
    parser.add_argument("--count", type=int, default=8, help="prompts to answer")
    parser.add_argument("--new", type=int, default=160, help="new tokens at most")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.model:
        answers(arguments.model, arguments.prompts, arguments.count, arguments.new, arguments.rounds)
        return
    passes(arguments.rounds)
    products(arguments.rounds)


if __name__ == "__main__":
    main()
