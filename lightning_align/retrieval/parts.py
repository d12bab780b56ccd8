"""Documents of any length in bounded memory: a long document is cut into parts, which are tokenized one by one.

Tokens of the parts are the tokens of the whole text where the tokenizer shows it (bytes, and byte-level BPE that splits words
at spaces). For another tokenizer a part ends before a white space, or anywhere if there is none. Tokens at such a place can
differ.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.tables import Ints
from lightning_align.types import Document

PART = 1 << 20
"""Characters per part of a long document. A document of at most twice as many is not cut."""
_SPACE = re.compile(r"\s(?=\S*\Z)")


class Part(NamedTuple):
    """A part of a long document."""

    id: str
    """The name of the document."""
    text: str
    is_first: bool
    is_last: bool


def cut(document: Document, rest: Iterable[str], split_point: Callable[[str], int]) -> Iterator[Document | Part]:
    """Cut a document into parts. A short document is yielded as it is.

    Args:
        document: The document, or its beginning.
        rest: What follows it.
        split_point: Returns a place in a text such that what is before it has the same ids, whatever follows. 0 if unknown.
    """
    pieces, text, start, is_first = iter(rest), document.text, 0, True
    while True:
        # Slices of one string: to shorten the string itself at each part would take quadratic time.
        while len(text) - start <= 2 * PART and (more := next(pieces, None)) is not None:
            text, start = text[start:] + more, 0
        if len(text) - start <= 2 * PART:
            yield document if is_first and not start else Part(document.id, text[start:], is_first, True)
            return
        part = text[start : start + PART]
        place = split_point(part) or _last_space(part)
        yield Part(document.id, part[:place], is_first, False)
        start, is_first = start + place, False


def _last_space(text: str) -> int:
    """Return the place of the last white space, or the length of the text if it has none after its beginning."""
    for start in (max(0, len(text) - 4096), 0):
        found = _SPACE.search(text, start)
        if found is not None and found.start():
            return found.start()
    return len(text)


def encode_part(part: Part, tokenizer: Any, dtype: Any, *, byte_counts: bool) -> dict[str, NDArray[Any]]:
    """Encode a part as the arrays of a block: ``tokens``, and ``begins`` if the bytes of chunks are counted.

    ``begins`` has the place in the bytes of the part at which each token begins, then the number of bytes.
    """
    if byte_counts:
        ids, marks = tokenizer.part(part.text, is_first=part.is_first)
    else:
        ids, marks = tokenizer.part_ids(part.text, is_first=part.is_first), []
    first = [tokenizer.bos_id] if part.is_first and tokenizer.bos_id is not None else []
    last = [tokenizer.eos_id] if part.is_last else []
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise ValueError(f"{part.id}: ids must be below `tokenizer.vocab_size` {tokenizer.vocab_size}, but got {ids.max()}.")
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.concatenate([np.array(first, dtype=dtype), ids.astype(dtype), np.array(last, dtype=dtype)]),
        "name": np.frombuffer(part.id.encode(), dtype=np.uint8),
        "part": np.array([part.is_first, part.is_last]),
    }
    if byte_counts:
        ends = _byte_places(part.text)
        characters = np.concatenate([[0] * len(first), marks, [len(part.text)] * len(last)]).astype(np.int64)
        arrays["begins"] = np.append(ends[characters], ends[-1]).astype(np.uint32)
    return arrays


def _byte_places(text: str) -> Ints:
    """Return the number of UTF-8 bytes before each character (len + 1,)."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])


def chunk_bytes(parts: Iterable[Mapping[str, NDArray[Any]]], chunk_size: int) -> NDArray[np.uint32]:
    """Count the bytes of each chunk of a long document, from its parts in order."""
    places: list[Ints] = []
    token = byte = 0
    for part in parts:
        begins = part["begins"].astype(np.int64)
        num = len(begins) - 1
        places.append(byte + begins[:-1][-token % chunk_size :: chunk_size])
        token, byte = token + num, byte + int(begins[-1])
    return np.diff(np.concatenate([*places, [byte]])).astype(np.uint32)


def text_tokens(parts: Iterable[Mapping[str, NDArray[Any]]], *, has_bos: bool) -> Iterator[NDArray[Any]]:
    """Yield the tokens of the parts of a long document without its beginning- and end-of-sequence tokens."""
    for part in parts:
        is_first, is_last = part["part"].tolist()
        yield part["tokens"][int(is_first and has_bos) : len(part["tokens"]) - is_last]
