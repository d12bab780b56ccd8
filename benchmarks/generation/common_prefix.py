"""Prompts with a common beginning, such as a system message or worked examples: it is read once, or with each prompt.

Both sides are the sampler of this package, and give the same tokens up to the rounding of the logits. The third side is
`generate` of transformers on a Llama of the same size, which reads each prompt whole.
"""

import argparse
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import common
from benchmarks.generation.sampling import DEPTH, HEADS, VOCABULARY, WIDTH, llama
from lightning_align.generation import prefix
from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.models.palm import PaLM


def report(rounds: int, prompts: int, batch_size: int) -> None:
    """Print the section."""
    torch.manual_seed(0)
    model = PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64).eval()
    common.heading(
        "Common beginning of prompts",
        f"{prompts} prompts, {batch_size} at a time, greedy, vocabulary {VOCABULARY:,}, width {WIDTH}, depth {DEPTH}, float32, "
        f"{torch.get_num_threads()} threads, random weights. {rounds} alternating rounds.",
    )
    table: list[dict[str, Any]] = []
    claims = []
    for shared, rest, new in ((512, 64, 32), (256, 64, 32), (32, 64, 64)):
        start = torch.randint(2, VOCABULARY, (shared,)).tolist()
        rows = [start + torch.randint(2, VOCABULARY, (rest,)).tolist() for _ in range(prompts)]
        config = GenerationConfig(max_new_tokens=new, temperature=0, batch_size=batch_size)
        answers: dict[str, list[list[Generation]]] = {}

        def once(rows: Any = rows, config: Any = config, answers: Any = answers) -> None:
            answers["once"] = generate(model, rows, config)

        def each(rows: Any = rows, config: Any = config, answers: Any = answers) -> None:
            with patch.object(prefix, "LEAST", 10**9):
                answers["each"] = generate(model, rows, config)

        batches = [torch.tensor(rows[i : i + batch_size]) for i in range(0, prompts, batch_size)]
        calls = [llama(batch, shared + rest + new, torch.float32, do_sample=False) for batch in batches]

        def peer(calls: Any = calls) -> None:
            for call in calls:
                call()

        timings = common.alternate({"once": once, "each": each, "transformers": peer}, rounds)
        same = sum(one == two for one, two in zip(answers["once"], answers["each"], strict=True))
        gain = 1 / common.ratio(timings["once"], timings["each"])
        table.append(
            {
                "common": str(shared),
                "rest": str(rest),
                "new": str(new),
                **{f"{side}, s": f"{common.median(t.seconds for t in timings[side]):.2f}" for side in timings},
                "once / each, speed": f"{gain:.2f}x",
                "once / transformers, speed": f"{1 / common.ratio(timings['once'], timings['transformers']):.2f}x",
                "equal responses": f"{same} of {prompts}",
                "background load": common.load(timings["once"] + timings["each"]),
            }
        )
        if shared > rest + new:
            claims.append(common.claim(f"common beginning of {shared} tokens: speed", "≥ 1.5x", f"{gain:.2f}x", gain >= 1.5))
    print(common.table(table))
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report(arguments.rounds, arguments.prompts, arguments.batch_size)


if __name__ == "__main__":
    main()
