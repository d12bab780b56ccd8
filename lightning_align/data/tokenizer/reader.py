"""The text of token ids that arrive one by one, in constant time per id.

`Tokenizer.decode` needs all ids of a text, so to know the text after each of N ids takes N decodings of up to N ids. Here, each
id is looked up. Both are compared on a few texts, because a tokenizer may decode in ways that a lookup does not know.
"""

import codecs
import json
import re
from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, Self

from lightning_align.data.tokenizer.byte import ByteTokenizer, byte_characters
from lightning_align.data.tokenizer.protocol import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no text, and for the first bytes of a character whose last byte is missing."""
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_PROBES = ("a", " a b", "The cat sat.\n\n  x = 1", "Größe 東京 🙂🙂 é", "don't stop , 3.14 !", "\t\u0431\u0301\u200b")


class TextReader(Protocol):
    """A reader of the ids of one text. `copy.copy` gives a reader that continues from the same place."""

    num_characters: int
    """The number of characters that are complete. Characters that are unknown count once a known one follows them."""

    def feed(self, token: int) -> str:
        """Read an id and return the characters that it completes."""
        ...

    def finish(self) -> str:
        """Return what is left at the end of the text: its unknown characters."""
        ...

    def __copy__(self) -> Self:
        """Return a reader that continues from the same place."""
        ...


def text_reader(tokenizer: Tokenizer) -> TextReader:
    """Return a reader at the beginning of a text."""
    if (known := _READERS.get(tokenizer.fingerprint)) is None:
        agreeing = (reader for reader in _candidates(tokenizer) if _agrees(reader, tokenizer))
        known = _READERS[tokenizer.fingerprint] = next(agreeing, None) or _Decoding(tokenizer)
    return copy(known)


_READERS: dict[str, TextReader] = {}
"""A reader of each tokenizer at the beginning of a text, by fingerprint."""


class _Bytes:
    """A reader of a tokenizer whose ids are bytes, one behind the other."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = getattr(tokenizer, "_model", None)
        self._special: frozenset[int] = getattr(tokenizer, "special_ids", frozenset())
        self._known: dict[int, bytes] = {}  # shared by all copies
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unknown = ""
        self.num_characters = 0

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__ |= self.__dict__
        new._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        new._decoder.setstate(self._decoder.getstate())
        return new

    def feed(self, token: int) -> str:
        """See `TextReader.feed`."""
        content = self._known.get(token)
        if content is None:
            content = self._known[token] = self._bytes_of(token)
        text = self._decoder.decode(content)
        if self._unknown or UNKNOWN in text:
            whole = self._unknown + text
            text = whole.rstrip(UNKNOWN)
            self._unknown = whole[len(text) :]
        self.num_characters += len(text)
        return text

    def finish(self) -> str:
        """See `TextReader.finish`."""
        return self._unknown + self._decoder.getstate()[0].decode("utf-8", "replace")

    def _bytes_of(self, token: int) -> bytes:
        if token in self._special:
            return b""
        if self._model is None:
            return bytes([token - 3])
        text = self._model.id_to_token(token) or ""
        codes = byte_characters()
        return bytes(codes[character] for character in text) if all(character in codes for character in text) else text.encode()


class _Pieces:
    """A reader of a tokenizer whose ids are pieces of text, and some of them single bytes (byte fallback of sentencepiece)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special: frozenset[int] = getattr(tokenizer, "special_ids", frozenset())
        self._has_bytes = "ByteFallback" in _decoder_types(tokenizer)
        self._known: dict[int, str | int] = {}
        self._before = self._known_token()
        self._started = False
        self._unknown = ""
        self._run = b""  # the bytes in a row that were read last
        self._shown = 0  # the number of characters that they have given
        self.num_characters = 0

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__ |= self.__dict__
        return new

    def feed(self, token: int) -> str:
        """See `TextReader.feed`."""
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._piece_of(token)
        if piece == "":
            return ""
        if not self._started:
            # Decoders leave out the space in front of the first word.
            self._started, alone = True, self._tokenizer.decode([token])
            piece = alone if isinstance(piece, str) or alone == "" else piece
        if isinstance(piece, int):
            # Decoders read the bytes in a row all or none.
            self._run += bytes([piece])
            try:
                characters = self._run.decode()
            except UnicodeDecodeError:
                return ""
            new, self._shown = characters[self._shown :], len(characters)
        else:
            new = self._unread() + piece
            self._run, self._shown = b"", 0
        whole = self._unknown + new
        text = whole.rstrip(UNKNOWN)
        self._unknown = whole[len(text) :]
        self.num_characters += len(text)
        return text

    def finish(self) -> str:
        """See `TextReader.finish`."""
        return self._unknown + self._unread()

    def _unread(self) -> str:
        """Return what stands for bytes in a row that are no text, as long as one character per byte."""
        if not self._run:
            return ""
        try:
            self._run.decode()
        except UnicodeDecodeError:
            return UNKNOWN * (len(self._run) - self._shown)
        return ""

    def _piece_of(self, token: int) -> str | int:
        if token in self._special:
            return ""
        if self._has_bytes and (found := _BYTE.fullmatch(self._tokenizer._model.id_to_token(token) or "")):
            return int(found[1], 16)
        first = self._tokenizer.decode([self._before])
        both = self._tokenizer.decode([self._before, token])
        if not both.startswith(first):
            raise ValueError("not a piece of text")
        return str(both[len(first) :])

    def _known_token(self) -> int:
        """Return an id that is a whole word, and remember what it says behind another word."""
        probes = [token for ids, _ in self._tokenizer.encode_batch(list(_PROBES)) for token in ids]
        for token in (*probes, *range(min(1000, self._tokenizer.vocab_size))):
            if token in self._special:
                continue
            text = self._tokenizer.decode([token])
            if text.strip() and UNKNOWN not in text:
                self._known[token] = self._tokenizer.decode([token, token])[len(text) :]
                return int(token)
        raise ValueError("no whole word")


class _Decoding:
    """A reader that decodes all ids again for each id, for tokenizers that no other reader can read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.num_characters = 0

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__ |= {**self.__dict__, "_ids": list(self._ids)}
        return new

    def feed(self, token: int) -> str:
        """See `TextReader.feed`."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids).rstrip(UNKNOWN)
        new = text[self.num_characters :]
        self.num_characters = max(self.num_characters, len(text))
        return new

    def finish(self) -> str:
        """See `TextReader.finish`."""
        return self._tokenizer.decode(self._ids)[self.num_characters :]


def _decoder_types(tokenizer: Any) -> set[str]:
    decoder = getattr(getattr(tokenizer, "_model", None), "decoder", None)
    if decoder is None:
        return set()
    content = json.loads(decoder.__getstate__())
    return {step["type"] for step in content.get("decoders", [content])}


def _candidates(tokenizer: Tokenizer) -> Sequence[TextReader]:
    if type(tokenizer) is ByteTokenizer or (_decoder_types(tokenizer) - {"Fuse"}) == {"ByteLevel"}:
        return (_Bytes(tokenizer),)
    try:
        return (_Pieces(tokenizer),)
    except (ValueError, AttributeError):
        return ()


def _agrees(reader: TextReader, tokenizer: Tokenizer) -> bool:
    """Check that a reader and the tokenizer read a few texts alike, up to each id."""
    for ids, _ in tokenizer.encode_batch(list(_PROBES)):
        one, slow = copy(reader), _Decoding(tokenizer)
        try:
            if any(one.feed(token) != slow.feed(token) for token in ids) or one.finish() != slow.finish():
                return False
        except (ValueError, AttributeError):
            return False
    return True
