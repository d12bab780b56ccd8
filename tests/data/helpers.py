"""Helpers of several tests in this folder: rows, tokenizers and encodings."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_align.data.encode import EncodedRow, encode_rows
from lightning_align.data.ledger import Ledger
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, train_tokenizer

FORMS = ("pair", "response", "messages")
WORDS = "the quick brown fox jumps over a lazy dog while seven small birds sing along 12 + 345 = 357".split()


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Write rows, or lines that are already strings, and return the path."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def small_bpe(folder: Path, *, vocab_size: int = 400) -> FileTokenizer:
    """Train a tokenizer with merges over spaces, letters and line breaks."""
    text = " ".join(WORDS[i * 7 % len(WORDS)] for i in range(600))
    rows = [{"text": text}, {"text": "Answer:\n\nthe dog. Answer: a fox! über naïve 東京 🙂 "}] * 3
    train_tokenizer([write_jsonl(folder / "corpus.jsonl", rows)], output=str(folder / "bpe.json"), vocab_size=vocab_size)
    return FileTokenizer(str(folder / "bpe.json"))


def encode(
    *fields: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    max_length: int = 1000,
    truncation: Any = "keep_start",
    mask_turns: Any = "last_turn",
    on_bad_row: Any = "fail",
    prompts_only: bool = False,
) -> tuple[list[EncodedRow], Ledger]:
    """Encode rows given as dictionaries."""
    ledger = Ledger("test", on_bad_row=on_bad_row)
    rows = (Row(row, f"test:{number}") for number, row in enumerate(fields, start=1))
    encoded = encode_rows(
        rows,
        tokenizer=tokenizer or ByteTokenizer(),
        ledger=ledger,
        accepted=("prompt", "messages") if prompts_only else FORMS,
        max_length=max_length,
        truncation=truncation,
        mask_turns=mask_turns,
        prompts_only=prompts_only,
    )
    return list(encoded), ledger


def spell(tokenizer: Tokenizer, row: EncodedRow, side: int = 0) -> tuple[str, str]:
    """Decode a side and the targets of the side, with special tokens."""
    tokens, targets, _ = row.sides[side]
    trained = [token for token, target in zip(tokens, targets, strict=True) if target]
    return tokenizer.decode(tokens, skip_special=False), tokenizer.decode(trained, skip_special=False)
