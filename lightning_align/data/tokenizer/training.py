"""Training a byte-level BPE tokenizer."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tqdm.auto import tqdm

from lightning_align.data.rows import SUFFIXES, read_rows
from lightning_align.runtime.files import publish_text


def train_tokenizer(rows: str | list[str], *, output: str, vocab_size: int = 8192, min_frequency: int = 2) -> None:
    """Train a byte-level BPE tokenizer on the text of rows and write it as a ``tokenizer.json``.

    The tokenizer is lossless. Its special tokens are ``<pad>``, ``<bos>`` and ``<eos>``. It splits numbers into single
    digits.

    Args:
        rows: A file of rows to train on, or a list of files. All text fields of the rows are used.
        output: The file to write, such as tokenizer.json.
        vocab_size: The number of tokens, at least 259: 256 bytes and 3 special tokens.
        min_frequency: How often a pair of tokens must occur to be merged into one token.

    Raises:
        ValueError: If a file cannot be read, there is no text, or an argument is out of range.
    """
    rows = [rows] if isinstance(rows, str) else rows
    if not output.endswith(".json"):
        raise ValueError(f"`output` must be a file name that ends in .json, but got {output!r}")
    if vocab_size < 259:
        raise ValueError(f"`vocab_size` must be at least 259 (256 bytes and 3 special tokens), but got {vocab_size}")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = tqdm(_texts_of_files(rows), desc="reading rows", unit=" texts", leave=False)
    model.train_from_iterator(texts, trainer)
    if texts.n == 0:
        raise ValueError(
            f"`rows` {', '.join(rows)} have no text field. Expected one of prompt, response, chosen, rejected, messages"
            " and text."
        )
    content = model.to_str(pretty=True)

    publish_text(Path(output), content)  # the model's own `save` raises a bare Exception if the disk is full
    print(f"wrote {output} with {model.get_vocab_size()} tokens")


def _texts_of_files(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        for row in read_rows(path):
            if row.problem:
                raise ValueError(f"{row.origin} {row.problem}; files end in {', '.join(SUFFIXES)}")
            for field in ("prompt", "response", "chosen", "rejected", "messages", "text"):
                value = row.fields.get(field)
                parts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
                for part in parts:
                    text = part.get("content") if isinstance(part, dict) else part
                    if isinstance(text, str):
                        yield text
