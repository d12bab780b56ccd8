"""Packing of plain texts into blocks of tokens, without padding."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lightning_align.data.columns import ROWS_PER_BATCH, check_ids, schema_of
from lightning_align.data.conversations import BadRowError
from lightning_align.data.encode import EncodedRow, EncodedTokens, chunks, with_bos, with_eos
from lightning_align.data.forms import FIELDS, form_of
from lightning_align.data.ledger import Ledger
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import Encoding, Tokenizer
from lightning_align.data.unread import unread_columns

_Ints = np.ndarray[Any, Any]
_TEXTS = pa.schema([("row", pa.int64()), ("tokens", pa.list_(pa.int32())), ("widths", pa.list_(pa.int32()))])


class EncodedText(NamedTuple):
    """A text as token ids, with its beginning and its end."""

    row: int
    tokens: list[int]
    widths: list[int]
    """The number of UTF-8 bytes of each token."""


def encode_blocks(rows: Iterable[Row], *, tokenizer: Tokenizer, ledger: Ledger, max_length: int) -> Iterator[EncodedRow]:
    """Encode plain texts, concatenate their tokens without padding, and split them into blocks.

    Each text begins with the beginning-of-sequence id, if the tokenizer has one, and ends with the end-of-sequence id. The
    last block is shorter, so that no token is lost; a last block of a single token has no target and is left out. All
    tokens of a block except the first are targets. The index of a block is the index of the text that its first token is
    from.

    Args:
        rows: Rows with a field ``text``.
        tokenizer: The tokenizer.
        ledger: The ledger that counts the rows.
        max_length: The number of tokens per block.

    Raises:
        ValueError: If a row is bad and the ledger has ``on_bad_row="fail"``.
    """
    texts = encode_texts(rows, tokenizer=tokenizer, ledger=ledger)
    batches = (texts_to_batch(chunk, vocab_size=tokenizer.vocab_size) for chunk in chunks(texts))
    for batch in block_batches(filter(None, batches), max_length=max_length):
        for block in batch.to_pylist():
            side = EncodedTokens(block["tokens_0"], block["targets_0"], block["num_bytes_0"])
            yield EncodedRow(block["row"], 0, [side])


def encode_texts(rows: Iterable[Row], *, tokenizer: Tokenizer, ledger: Ledger) -> Iterator[EncodedText]:
    """Encode plain texts one by one, for `block_batches`. For the arguments see `encode_blocks`."""
    for chunk in chunks(enumerate(rows)):
        texts: list[tuple[int, str]] = []
        for index, row in chunk:
            try:
                texts.append((index, _read_text(row)))
                for name in unread_columns(row.fields, FIELDS["text"]):
                    ledger.skip_column(name)
            except BadRowError as error:
                ledger.drop(error.reason, origin=row.origin, problem=error.problem)
        for (index, text), encoding in zip(texts, tokenizer.encode_batch([text for _, text in texts]), strict=True):
            ids, doubled = with_bos(encoding.ids, tokenizer)
            if doubled:
                ledger.note("double_bos")
            ledger.keep()
            body = _byte_widths(encoding, text)
            padding = [0] * max(0, len(ids) - len(body))
            tokens = with_eos(ids, tokenizer)
            # Special tokens that were added stand for no bytes.
            widths = padding + body[len(body) + len(padding) - len(ids) :]
            widths = widths[: len(tokens)] + [0] * (len(tokens) - len(widths))
            yield EncodedText(index, tokens, widths)


def texts_to_batch(texts: list[EncodedText], *, vocab_size: int) -> pa.RecordBatch | None:
    """Convert texts to a batch. None if there are none.

    Raises:
        ValueError: If an id is outside the vocabulary.
    """
    if not texts:
        return None
    for _, tokens, _ in texts:
        check_ids(np.array(tokens), vocab_size)
    columns = zip(*texts, strict=True)
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, _TEXTS, strict=True)], schema=_TEXTS
    )


def block_batches(texts: Iterable[pa.RecordBatch], *, max_length: int) -> Iterator[pa.RecordBatch]:
    """Split the tokens of batches of texts into blocks of ``max_length`` tokens, with the columns of a store.

    The tokens that wait for the next block are all that is held in memory.
    """
    rest: list[_Ints] = [np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)]
    for batch in texts:
        owners = np.repeat(batch["row"].to_numpy(), batch["tokens"].value_lengths().to_numpy())
        new = (batch["tokens"].flatten().to_numpy(), batch["widths"].flatten().to_numpy(), owners)
        rest = [np.concatenate(pair) for pair in zip(rest, new, strict=True)]
        num_whole = len(rest[0]) // max_length * max_length
        for start in range(0, num_whole, max_length * ROWS_PER_BATCH):
            stop = min(num_whole, start + max_length * ROWS_PER_BATCH)
            yield _blocks(*(values[start:stop].reshape(-1, max_length) for values in rest))
        rest = [values[num_whole:] for values in rest]
    # A block of one token has no target.
    if len(rest[0]) > 1:
        yield _blocks(*(values[None] for values in rest))


def _blocks(tokens_BN: _Ints, widths_BN: _Ints, owners_BN: _Ints) -> pa.RecordBatch:
    num_blocks, length = tokens_BN.shape
    starts = pa.array(np.arange(num_blocks + 1, dtype=np.int32) * np.int32(length))
    targets_BN = np.ones((num_blocks, length), dtype=np.bool_)
    targets_BN[:, 0] = False
    arrays = [
        pa.array(owners_BN[:, 0]),
        pa.array(np.zeros(num_blocks, dtype=np.int32)),
        pa.ListArray.from_arrays(starts, pa.array(tokens_BN.reshape(-1))),
        pa.ListArray.from_arrays(starts, pa.array(targets_BN.reshape(-1))),
        pa.array(widths_BN[:, 1:].sum(axis=1, dtype=np.int64)),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema_of(1))


def _read_text(row: Row) -> str:
    if row.problem:
        raise BadRowError("unreadable", row.problem)
    form_of(row.fields, accepted=("text",))
    text = row.fields["text"]
    if not isinstance(text, str):
        raise BadRowError("wrong_type", f"has a value of type {type(text).__name__} in field 'text', expected a string")
    if not text.strip():
        raise BadRowError("empty_text", "has an empty text in field 'text', expected text to train on")
    return text


def _byte_widths(encoding: Encoding, text: str) -> list[int]:
    """Count the UTF-8 bytes of each token's characters. A character of several tokens counts for the first of them."""
    widths = []
    reached = 0
    for start, end in encoding.offsets:
        widths.append(len(text[max(start, reached) : end].encode()))
        reached = max(reached, end)
    return widths
