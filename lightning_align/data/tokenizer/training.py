"""Training a byte-level BPE tokenizer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tqdm.auto import tqdm

from lightning_align.data.rows import SUFFIXES, read_rows
from lightning_align.runtime.files import publish_text

COLUMNS = (
    *("prompt", "response", "chosen", "rejected", "messages", "text", "system", "system_prompt"),
    *("conversations", "conversation", "instruction", "input", "output", "context", "history", "question", "answer"),
    *("completion", "completions", "answers", "responses", "info", "summaries", "human_ref_A", "human_ref_B"),
    *("response_0", "response_1", "response_2", "response1", "response2", "output_1", "output_2"),
    *("conversation_a", "conversation_b"),
)
"""The columns of text of the forms and the shapes of rows."""
PARTS = ("content", "value", "text", "answer", "response", "input", "output", "post", "article")
"""The texts of messages, answers and structs in these columns."""


def train_tokenizer(
    rows: str | list[str] | list[dict[str, Any]],
    *,
    output: str,
    vocab_size: int = 8192,
    min_frequency: int = 2,
    columns: list[str] | None = None,
) -> None:
    """Train a byte-level BPE tokenizer on the text of rows and write it as a ``tokenizer.json``.

    The tokenizer is lossless. Its special tokens are ``<pad>``, ``<bos>`` and ``<eos>``. It splits numbers into single
    digits.

    Args:
        rows: A file of rows to train on, a folder, a pattern (data/part-*.jsonl), a hub dataset, a list of these, or a mixture
            as in the data module. Every text counts once, whatever the weights of a mixture.
        output: The file to write, such as tokenizer.json.
        vocab_size: The number of tokens, at least 259: 256 bytes and 3 special tokens.
        min_frequency: How often a pair of tokens must occur to be merged into one token.
        columns: The columns to use. A dot reads a column within a struct. Default is the columns that the shapes of rows have.

    Raises:
        ValueError: If a file cannot be read, there is no text, or an argument is out of range.
    """
    parts = _sources(rows, columns or ())
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
    texts = tqdm(_texts_of_files(parts), desc="reading rows", unit=" texts", leave=False, disable=None)
    number = 0

    def counted() -> Iterator[str]:
        nonlocal number  # the bar counts nothing where it is not shown
        for text in texts:
            number += 1
            yield text

    model.train_from_iterator(counted(), trainer)
    if not number:
        raise ValueError(
            f"`rows` {', '.join(source for source, _ in parts)} have no text in the columns that are read"
            f" ({', '.join(columns or COLUMNS)}). Name the columns of the texts with `columns`."
        )
    content = model.to_str(pretty=True)

    publish_text(Path(output), content)  # the model's own `save` raises a bare Exception if the disk is full
    print(f"wrote {output} with {model.get_vocab_size()} tokens")


def _texts_of_files(parts: Iterable[tuple[str, Sequence[str]]]) -> Iterator[str]:
    for source, names in parts:
        for row in read_rows(source):
            if row.problem:
                raise ValueError(f"{row.origin} {row.problem}; files end in {', '.join(SUFFIXES)}")
            missing = [name for name in names if name.partition(".")[0] not in row.fields]
            if missing:
                raise ValueError(
                    f"{row.origin} has no column {missing[0]!r}, which `columns` names. The columns are:"
                    f" {', '.join(row.fields)}"
                )
            for name in names or COLUMNS:
                first, _, rest = name.partition(".")
                yield from _strings(row.fields.get(first), rest)


def _strings(value: Any, path: str = "") -> Iterator[str]:
    """Yield the texts of a column: of a string, of messages, or of what a path of names leads to."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, path)
    elif isinstance(value, dict):
        first, _, rest = path.partition(".")
        for name in [first] if first else PARTS:
            yield from _strings(value.get(name), rest)


def _sources(rows: str | Sequence[str | Mapping[str, Any]], columns: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Return each source with the columns to read. The parts of a mixture may name their own."""
    parts: list[tuple[str, Sequence[str]]] = []
    for part in [rows] if isinstance(rows, str) else rows:
        if isinstance(part, str):
            parts.append((part, columns))
            continue
        sources = part.get("source", ())
        known = ("source", "weight", "columns", "roles", "shape", "ranked_pairs")
        if not sources or (unknown := [name for name in part if name not in known]):
            fault = f"an unknown {unknown[0]!r}" if sources else "no `source`"
            raise ValueError(f"the parts of a mixture in `rows` must have a `source` and may have {known[1:]}, but got {fault}")
        own = list((part.get("columns") or {}).values()) or columns
        parts += [(source, own) for source in ([sources] if isinstance(sources, str) else sources)]
    return parts
