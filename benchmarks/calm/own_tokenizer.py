"""An augment with its own tokenizer: the conversion of a row, and the time per generated token.

Two byte-level BPE tokenizers are trained on modules of the standard library. A row of 2,048 tokens of one is converted to
tokens of the other. The other side decodes every prefix of the row, and for each generated token converts and reads the whole
row again. Anchor and augment are PaLMs of width 256 and depth 4.
"""

import argparse
import inspect
import json
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.common import alternate, claim, heading, load, median, ratio, table
from lightning_align import CALM, Augment, AugmentInput, PaLM
from lightning_align.calm.alignment import Alignment
from lightning_align.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

MODULES = ("argparse", "json.decoder", "inspect", "tarfile", "typing", "pathlib", "subprocess", "textwrap")


def tokenizers(folder: Path, *sizes: int) -> tuple[str, list[Tokenizer]]:
    """A text, and tokenizers of these sizes that are trained on it."""
    text = "\n".join(inspect.getsource(import_module(name)) for name in MODULES)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n\n")), encoding="utf-8")
    found = []
    for size in sizes:
        path = str(folder / f"{size}.json")
        train_tokenizer(str(rows), output=path, vocab_size=size)
        found.append(load_tokenizer(path))
    return text, found


def every_prefix(ids: list[int], tokenizer: Tokenizer, other: Tokenizer) -> AugmentInput:
    """Encode the whole row again, and find the characters of each of its tokens by decoding every prefix."""
    ends = [len(tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}")) for count in range(1, len(ids) + 1)]
    (encoding,) = other.encode_batch([tokenizer.decode(ids)])
    own_ends = torch.tensor([[end for _, end in encoding.offsets]])
    return AugmentInput(torch.tensor([encoding.ids]), ends=own_ends, anchor_ends=torch.tensor([ends]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per round; the other side generates 4")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        text, (tokenizer, other) = tokenizers(Path(folder), 4096, 2048)
    ids = tokenizer.encode_batch([text])[0].ids[: options.length]
    alignment = Alignment(tokenizer, [other])

    def fresh() -> object:
        return Alignment(tokenizer, [other]).read(0, ids, 0)

    rows = {
        "every prefix": lambda: every_prefix(ids, tokenizer, other),
        "ours, first row": fresh,
        "ours, later rows": lambda: alignment.read(0, ids, 0),
    }
    for run in rows.values():
        run()
    converted = alternate(rows, options.rounds)

    sizes = {"dim": 256, "depth": 4, "heads": 4, "dim_head": 64}
    anchor, augment = (PaLM(num_tokens=one.vocab_size, **sizes) for one in (tokenizer, other))
    model = CALM(anchor, Augment(augment, tokens="own", num_connections=2))
    model.alignment = alignment

    @torch.no_grad()
    def again(count: int) -> None:
        row = list(ids)
        for _ in range(count):
            logits = model(torch.tensor([row]), inputs=[every_prefix(row, tokenizer, other)])
            row.append(int(logits[0, -1].argmax()))

    few, total = 4, options.tokens * (options.rounds + 1)

    def decoder(prompts: int) -> Callable[[], object]:
        """Read prompts, and return a function that goes on with them."""
        assert model.make_cache is not None
        cache, last = model.make_cache(prompts, len(ids) + total), torch.tensor([ids] * prompts)

        @torch.no_grad()
        def run(count: int = options.tokens) -> None:
            nonlocal last
            for _ in range(count):
                positions = torch.arange(cache.length, cache.length + last.shape[1])
                last = model(last, positions=positions, cache=cache)[:, -1:].argmax(dim=-1)

        run(1)
        return run

    sides = {"every prefix": lambda: again(few), "one row": decoder(1), "8 rows": decoder(8)}
    generated = alternate(sides, options.rounds)
    before = median(timing.seconds for timing in generated["every prefix"]) / few
    one, eight = (
        median(timing.seconds for timing in generated[side]) / options.tokens / rows
        for side, rows in (("one row", 1), ("8 rows", 8))
    )
    heading(
        "CALM: an augment with its own tokenizer",
        f"Conversion of a row of {options.length:,} tokens, and generation behind it, {torch.get_num_threads()} threads.",
    )
    peer = converted["every prefix"]
    print(
        table(
            [
                {
                    "conversion of a row": name,
                    "ms": f"{1000 * median(timing.seconds for timing in timings):.1f}",
                    "speedup": f"{1 / ratio(timings, peer):.0f}",
                    "background load": load(timings),
                }
                for name, timings in converted.items()
            ]
        )
    )
    print(
        table(
            [
                {"generation": name, "ms per token": f"{1000 * seconds:.1f}", "background load": load(generated[side])}
                for name, seconds, side in (
                    ("every prefix, the whole row again", before, "every prefix"),
                    ("ours, one row", one, "one row"),
                    ("ours, 8 rows together, per token of a row", eight, "8 rows"),
                )
            ]
        )
    )
    speedup = 1 / ratio(converted["ours, first row"], peer)
    print(
        table(
            [
                claim("conversion of a first row", "≥ 10x", f"{speedup:.0f}x", speedup >= 10),
                claim("a generated token", "≥ 50x", f"{before / one:.0f}x", before >= 50 * one),
            ]
        )
    )


if __name__ == "__main__":
    main()
