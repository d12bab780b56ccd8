"""Packing of plain texts into blocks of tokens, without padding."""

from collections.abc import Iterable, Iterator

from lightning_align.data.encode import EncodedRow, EncodedTokens, chunks, with_bos, with_eos
from lightning_align.data.forms import BadRowError, form_of
from lightning_align.data.ledger import Ledger
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import Encoding, Tokenizer


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
    tokens: list[int] = []
    widths: list[int] = []
    owners: list[int] = []
    for chunk in chunks(enumerate(rows)):
        texts: list[tuple[int, str]] = []
        for index, row in chunk:
            try:
                texts.append((index, _read_text(row)))
            except BadRowError as error:
                ledger.drop(error.reason, origin=row.origin, problem=error.problem)
        for (index, text), encoding in zip(texts, tokenizer.encode_batch([text for _, text in texts]), strict=True):
            ids, doubled = with_bos(encoding.ids, tokenizer)
            if doubled:
                ledger.note("double_bos")
            ledger.keep()
            body = _byte_widths(encoding, text)
            padding = [0] * max(0, len(ids) - len(body))
            tokens += with_eos(ids, tokenizer)
            # Special tokens that were added stand for no bytes.
            widths += padding + body[len(body) + len(padding) - len(ids) :]
            widths += [0] * (len(tokens) - len(widths))
            owners += [index] * (len(tokens) - len(owners))
        num_whole = len(tokens) // max_length * max_length
        for start in range(0, num_whole, max_length):
            yield _block(tokens, widths, owners, start, start + max_length)
        tokens, widths, owners = tokens[num_whole:], widths[num_whole:], owners[num_whole:]
    # A block of one token has no target.
    if len(tokens) > 1:
        yield _block(tokens, widths, owners, 0, len(tokens))


def _block(tokens: list[int], widths: list[int], owners: list[int], start: int, stop: int) -> EncodedRow:
    targets = [False] + [True] * (stop - start - 1)
    return EncodedRow(owners[start], 0, [EncodedTokens(tokens[start:stop], targets, sum(widths[start + 1 : stop]))])


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
