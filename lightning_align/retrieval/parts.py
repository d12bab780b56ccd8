"""Documents of any length in bounded memory: a long document is cut into parts, which are tokenized one by one.

A part ends where the Unicode form of what is before does not depend on what follows, so that the letters of the parts are
those of the text. Shingles across two parts are made when the parts are read again. So the sketch of a document is the same,
however it was cut.

Tokens of the parts are the tokens of the whole text where the tokenizer shows it (bytes, and byte-level BPE that splits words
at spaces). For another tokenizer a part ends before a white space, or anywhere if there is none. Tokens at such a place can
differ.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.duplicates import (
    ALL,
    BINS,
    EMPTY,
    WINDOW,
    Hashes,
    Sketch,
    fill,
    letters,
    mix,
    one_form,
    sketch,
    smallest,
    sum_of_characters,
    windows,
)
from lightning_align.retrieval.sources import Digest, content_of
from lightning_align.retrieval.tables import Ints
from lightning_align.types import Document

_ATTEMPTS, _FARTHEST, _NEAR = 64, 4096, 32
"""How often, how far and in how many characters a place to cut is looked for."""
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
    digest: bytes = b""
    """The hash of the whole document, at its last part."""


def cut(document: Document, rest: Iterable[str], split_point: Callable[[str], int]) -> Iterator[Document | Part]:
    """Cut a document into parts. A short document is yielded as it is.

    Args:
        document: The document, or its beginning.
        rest: What follows it.
        split_point: Returns a place in a text such that what is before it has the same ids, whatever follows. 0 if unknown.
    """
    pieces, text, start, is_first = iter(rest), document.text, 0, True
    hashed = Digest(document.id)
    while True:
        # Slices of one string: to shorten the string itself at each part would take quadratic time.
        while len(text) - start <= 2 * PART and (more := next(pieces, None)) is not None:
            text, start = text[start:] + more, 0
        if len(text) - start <= 2 * PART:
            if is_first:
                yield Document(document.id, text)
            else:
                hashed.update(text[start:])
                yield Part(document.id, text[start:], False, True, hashed.digest())
            return
        part = text[start : _place(text, start, split_point)]
        hashed.update(part)
        yield Part(document.id, part, is_first, False)
        start, is_first = start + len(part), False


def _place(text: str, start: int, split_point: Callable[[str], int]) -> int:
    """Return the place at which to end the part that begins at `start`. It is before the end of the text."""
    stop = start + PART
    for _ in range(_ATTEMPTS):
        places = range(stop, max(start, stop - _FARTHEST), -1)
        settled = next((place for place in places if _is_settled(text, place)), stop)
        part = text[start:settled]
        place = start + (split_point(part) or _last_space(part))
        if place == settled or _is_settled(text, place):
            return place
        stop = place
    return stop


def _is_settled(text: str, place: int) -> bool:
    """Whether the Unicode forms of the two sides of a place in a text make that of the text."""
    if text[place].isascii():
        return True
    before, after = text[max(0, place - _NEAR) : place], text[place : place + _NEAR]
    return not unicodedata.combining(text[place]) and one_form(before + after) == one_form(before) + one_form(after)


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
        "ids": np.frombuffer(json.dumps([part.id]).encode(), dtype=np.uint8),
        "part": np.array([part.is_first, part.is_last]),
        "digests": np.frombuffer(part.digest, dtype=np.uint64).reshape(-1, 2),
        "content": content_of(part),
        **text_arrays(part),
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


def text_arrays(part: Part) -> dict[str, NDArray[Any]]:
    """Return what a `WholeText` needs of a part: the hashes within it, and the letters at its ends."""
    found = letters(part.text)
    hashes = windows(found)
    kept, plain = sketch(hashes), ""
    if len(found) < WINDOW:  # the whole document can have as few
        text = one_form(part.text)
        text = text.removeprefix("\ufeff") if part.is_first else text
        plain = " " * text[:1].isspace() + " ".join(text.split()) + " " * text[-1:].isspace()
    return {
        "head": found[: WINDOW - 1],
        "tail": found[1 - WINDOW :],
        "num_letters": np.array([len(found)]),
        "bins": smallest(hashes),
        "hashes": kept.hashes,
        "limit": np.array([kept.limit], dtype=np.uint64),
        "plain": np.frombuffer(plain.encode("utf-8", errors="surrogatepass"), dtype=np.uint8),
    }


class WholeText:
    """The signature and the sketch of a long document, from its parts in order. They equal those of the whole text.

    It holds the sketch, which is half a byte per letter.

    Args:
        parts: The `text_arrays` of each part.
    """

    def __init__(self, parts: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        self._bins = np.full(BINS, EMPTY)
        self._hashes: list[Hashes] = []
        carry, letters_so_far, self._is_cut = np.zeros(0, dtype=np.uint32), 0, False
        total, num, is_spaced = np.zeros(1, dtype=np.uint64), 0, False
        for part in parts:
            across = windows(np.concatenate([carry, part["head"]]))
            np.minimum(self._bins, np.minimum(part["bins"], smallest(across)), out=self._bins)
            self._hashes += [part["hashes"], across]
            self._is_cut |= bool(part["limit"][0] != ALL)
            carry = np.concatenate([carry, part["tail"]])[1 - WINDOW :]
            letters_so_far += int(part["num_letters"][0])
            plain = part["plain"].tobytes().decode("utf-8", errors="surrogatepass")
            if words := plain.strip(" "):
                text = " " * (num > 0 and (is_spaced or plain[0] == " ")) + words
                total, num, is_spaced = total + sum_of_characters(text, num), num + len(text), plain[-1] == " "
            else:
                is_spaced |= bool(plain)
        if letters_so_far < WINDOW:
            whole = mix(total)
            self._bins, self._hashes = smallest(whole), [whole]

    def signature(self) -> Hashes:
        """See `duplicates.signature`."""
        return fill(self._bins)

    def sketch(self) -> Sketch:
        """See `duplicates.sketch`."""
        self._hashes = [np.concatenate(self._hashes)]
        found = sketch(self._hashes[0])
        # A part that has more hashes than its sketch tells that the document has more, too.
        return Sketch(found.hashes, found.hashes[-1]) if self._is_cut and found.limit == ALL else found
