"""Stop texts: the end of a response by what it says, whatever tokens it is cut into.

A text is searched in what the tokens say together, never token by token. So it may begin or end inside a token, and its
characters may be split into bytes. The tokens are read behind an anchor, a token before them, because many decoders drop the
space of the first token. Special tokens are read both ways: left out, and as their text.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from lightning_align.generation.support import Support

Decode = Callable[[list[int]], str]
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_WRITABLE: dict[tuple[str, str], bool] = {}


class StopTexts:
    """The stop texts of a run. Build it with `of` where there is a tokenizer.

    Args:
        texts: The texts that end a response.
        decode: A function from ids to text. It may leave out special tokens.
        shown: The same with special tokens as their text. Default is that they are not read.
        specials: The ids of the special tokens. If they are known, responses without them are read only once.

    Raises:
        ValueError: If a text is empty, or contains a character that no UTF-8 text has.
    """

    def __init__(
        self, texts: Sequence[str], decode: Decode, *, shown: Decode | None = None, specials: Collection[int] | None = None
    ) -> None:
        self.texts = tuple(texts)
        for text in self.texts:
            if not text:
                raise _refused(text, "it is empty")
            if UNKNOWN in text:
                raise _refused(text, "it contains U+FFFD, which stands for bytes that are no text")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise _refused(text, "it contains half of a surrogate pair, which no UTF-8 text has")
        self._decode, self._shown = decode, shown
        self._specials = None if specials is None else frozenset(specials)
        self._anchor: tuple[list[int], str] | None = None
        self._needed = max((len(text.encode()) for text in self.texts), default=0) + 4  # bytes, and one split character

    @classmethod
    def of(
        cls, texts: Sequence[str], tokenizer: Any, *, ends: Sequence[int] = (), support: Support | None = None
    ) -> "StopTexts":
        """Build stop texts that the tokenizer can write.

        Args:
            texts: The texts that end a response.
            tokenizer: The tokenizer.
            ends: The ids that end a response.
            support: The ids that exist. Default is those of the tokenizer.

        Raises:
            ValueError: If no response can ever contain a text.
        """

        def shown(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special=False))

        stop = cls(texts, tokenizer.decode, shown=shown, specials=getattr(tokenizer, "special_ids", None))
        support = support or Support.of(tokenizer)
        candidates = (*tokenizer.encode_batch(["a"])[0].ids, *(token for token in range(support.size or 0) if token in support))
        stop._anchor = next((found for token in candidates if (found := stop._as_anchor(token))), None)
        for text in stop.texts:
            ids = list(tokenizer.encode_batch([text])[0].ids)
            if any(token in ends for token in ids[:-1]):
                raise _refused(text, "it goes on behind an end-of-sequence token, where a response is over")
            if not stop._says(ids, text) and not stop._remembered(text, support, getattr(tokenizer, "fingerprint", None)):
                written = shown(ids)
                raise _refused(text, f"the tokenizer has no tokens that say it (it writes {written!r} instead)")
        return stop

    def reached(self, tokens: list[int]) -> bool:
        """Return whether a response contains a stop text near its end.

        Args:
            tokens: The ids of the response so far. Call it after each token.
        """
        if not self.texts:
            return False
        if any(text in self._tail(self._decode, tokens) for text in self.texts):
            return True
        recent = tokens[-2 * self._needed :]
        if self._shown is None or (self._specials is not None and self._specials.isdisjoint(recent)):
            return False
        return any(text in self._tail(self._shown, tokens) for text in self.texts)

    def _tail(self, decode: Decode, tokens: list[int]) -> str:
        """Read as many of the last tokens as the longest text may need. Special tokens that are left out say nothing."""
        width = self._needed
        while True:
            text = self._behind_anchor(decode, tokens[-width:])
            enough = len(text.replace(UNKNOWN, "?").encode(errors="replace")) >= self._needed
            # Some decoders read bytes in a row all or none, so no character may be cut in front.
            if width >= len(tokens) or (enough and not text.startswith(UNKNOWN)):
                return text
            width *= 2

    def _behind_anchor(self, decode: Decode, tokens: list[int]) -> str:
        if self._anchor is None:
            self._anchor = next((found for token in tokens if (found := self._as_anchor(token))), None)
        if self._anchor is not None:
            ids, start = self._anchor
            text = decode([*ids, *tokens])
            if text.startswith(start):
                return text[len(start) :]
        return decode(tokens)

    def _as_anchor(self, token: int) -> tuple[list[int], str] | None:
        """Return a token with its text, if it is a whole word that decoders write the same with and without special tokens."""
        text = self._decode([token])
        whole = bool(text.strip()) and UNKNOWN not in text
        return ([token], text) if whole and (self._shown is None or self._shown([token]) == text) else None

    def _says(self, ids: list[int], text: str) -> bool:
        return any(text in self._behind_anchor(decode, ids) for decode in (self._decode, self._shown) if decode is not None)

    def _remembered(self, text: str, support: Support, fingerprint: str | None) -> bool:
        """Return `_writable`, computed once per tokenizer, because it reads the whole vocabulary."""
        if fingerprint is None:
            return self._writable(text, support)
        if (fingerprint, text) not in _WRITABLE:
            _WRITABLE[fingerprint, text] = self._writable(text, support)
        return _WRITABLE[fingerprint, text]

    def _writable(self, text: str, support: Support) -> bool:
        """Return whether any tokens, one behind the other, say the text. It may begin and end inside a token."""
        pieces: set[str] = set()
        for token in range(support.size or 0):
            if token in support:
                pieces |= {self._behind_anchor(decode, [token]) for decode in (self._decode, self._shown) if decode is not None}
        if any(UNKNOWN in piece for piece in pieces) and not text.isascii():
            return True  # tokens that are bytes can say any character
        pieces.discard("")
        if any(text in piece for piece in pieces):
            return True
        reached = {k for piece in pieces for k in range(1, min(len(piece), len(text))) if piece.endswith(text[:k])}
        reached |= {len(piece) for piece in pieces if text.startswith(piece)}
        for position in range(1, len(text)):
            if position in reached:
                rest = text[position:]
                if any(piece.startswith(rest) for piece in pieces):
                    return True
                reached |= {position + len(piece) for piece in pieces if rest.startswith(piece)}
        return len(text) in reached


def _refused(text: str, reason: str) -> ValueError:
    return ValueError(f"`stop` of GenerationConfig must be texts that a response can contain, but got {text!r}: {reason}.")
