"""The text of the anchor's tokens, cut into pieces that an augment with its own tokenizer reads.

A tokenizer may write a text in other tokens once it goes on: "new", but "newly". If the augment read the whole text at once,
its tokens in front of a position would depend on what is behind it. So the text is cut into pieces, each piece is encoded
alone, and only the tokens up to a position decide on the cuts in front of it:

1. A piece ends before each space that follows another character. Tokenizers that split at spaces encode such pieces as they
   encode the whole text.
2. A piece ends at the end of the prompt.
3. In the response, a piece ends behind each token of two or more visible characters, and after 16 characters.

A position sees the tokens of the pieces that have ended by then. All of a prompt is therefore read as words and visible to the
response. In the response, the augment has read what the anchor has read, apart from letters that are tokens of their own.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

from lightning_align.data.tokenizer import ByteTokenizer, Tokenizer, all_ends
from lightning_align.data.tokenizer.pieces import PieceEncoder
from lightning_align.data.tokenizer.reader import text_reader

_MOST_OPEN = 16
"""The number of characters after which a piece of a response ends."""


class Piece(NamedTuple):
    """A piece of the text of a row."""

    text: str
    start: int
    """The number of characters before it."""
    column: int
    """The first column of the anchor that may see its tokens."""


class Cutter:
    """The text of a row of tokens that arrive one by one, cut into pieces.

    Args:
        tokenizer: The tokenizer of the tokens.
        at_once: Whether each token ends a piece.
        column: The column of the first token.
        num_prompt: The number of tokens of the prompt. 0 if there is none, or if it is not known.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_once: bool, num_prompt: int, column: int = 0) -> None:
        self._reader = text_reader(tokenizer)
        self._at_once = at_once
        self.column, self._behind_prompt = column, column + num_prompt
        self._open = ""
        self._searched = 1
        self._start = 0

    def __copy__(self) -> "Cutter":
        new = object.__new__(type(self))
        new.__dict__ |= {**self.__dict__, "_reader": copy(self._reader)}
        return new

    @property
    def num_characters(self) -> int:
        """The number of characters that are complete."""
        return self._reader.num_characters

    def feed(self, token: int) -> list[Piece]:
        """Read a token and return the pieces that end with it."""
        text = self._reader.feed(token)
        pieces = []
        if text:
            self._open += text
            while (place := self._open.find(" ", self._searched)) > 0:
                self._searched = place + 1
                if not self._open[place - 1].isspace():
                    pieces.append(self._close(place))
            self._searched = max(1, len(self._open))
        in_response = self.column >= self._behind_prompt
        if (
            self._at_once
            or self.column == self._behind_prompt - 1
            or (in_response and (len(text.strip()) > 1 or len(self._open) >= _MOST_OPEN))
        ):
            pieces += self.close()
        self.column += 1
        return pieces

    def finish(self) -> int:
        """Read the end of the text, which may have unknown characters, and return the length of the text."""
        self._open += self._reader.finish()
        return self._start + len(self._open)

    def close(self) -> list[Piece]:
        """End the last piece in the current column."""
        return [self._close(len(self._open))] if self._open else []

    def _close(self, length: int) -> Piece:
        piece = Piece(self._open[:length], self._start, self.column)
        self._open, self._searched, self._start = self._open[length:], 1, self._start + length
        return piece


class Reading(NamedTuple):
    """A row of the anchor as tokens of an augment, as lists or arrays of integers."""

    ids: Any
    ends: Any
    """The number of characters up to and including each token of the augment."""
    columns: Any
    """The first column of the anchor that may see each token. The length of the row if none may."""
    anchor_ends: Any
    """The number of characters up to and including each token of the anchor."""

    def behind(self, num_pads: int) -> "Reading":
        """Return the row with padding on the left."""
        if num_pads == 0:
            return self
        columns = [column + num_pads for column in self.columns]
        return self._replace(columns=columns, anchor_ends=[*[0] * num_pads, *self.anchor_ends])


Placed = tuple[int, int, int]
"""A token of an augment: its id, the number of characters of the anchor up to and including it, and its column."""


class Turn(NamedTuple):
    """A part of a row whose text the augment reads, behind ids that replace the text before it."""

    start: int
    """The first column."""
    stop: int
    """The column behind the last one."""
    before: Sequence[int]
    """The augment's ids of what comes before, as its own chat template writes it. All are visible from the column before."""
    end: Sequence[int] = ()
    """The augment's ids of the end of the turn, visible from the last column."""


class OwnTokenizer:
    """The conversion of rows of the anchor to tokens of an augment with its own tokenizer.

    Args:
        tokenizer: The tokenizer of the anchor.
        other: The tokenizer of the augment.
    """

    def __init__(self, tokenizer: Tokenizer, other: Tokenizer) -> None:
        self.tokenizer, self.other = tokenizer, other
        self.encoder = PieceEncoder(other)
        # Bytes do not depend on what follows them.
        self._at_once = isinstance(other, ByteTokenizer)
        self._ends = frozenset(all_ends(tokenizer))

    def cutter(self, *, num_prompt: int, column: int = 0) -> Cutter:
        """Return a cutter for a new row. See `Cutter`."""
        return Cutter(self.tokenizer, at_once=self._at_once, num_prompt=num_prompt, column=column)

    def encode(self, pieces: Sequence[Piece], *, is_whole: bool = True) -> list[Placed]:
        """Encode pieces of one row.

        Args:
            pieces: The pieces.
            is_whole: Whether the augment's text begins with that of the anchor.
        """
        encoded = self.encoder.encode([(is_whole and piece.start == 0, piece.text) for piece in pieces])
        return [
            (token, piece.start + end, piece.column)
            for piece, (ids, ends) in zip(pieces, encoded, strict=True)
            for token, end in zip(ids, ends, strict=True)
        ]

    def place(self, ids: Sequence[int], *, end: int, column: int) -> list[Placed]:
        """Place ids of the augment such that they end at a character of the anchor, with the characters of their own text."""
        reader, ends = text_reader(self.other), []
        for token in ids:
            reader.feed(token)
            ends.append(reader.num_characters)
        return [(token, end - (ends[-1] - own), column) for token, own in zip(ids, ends, strict=True)]

    def read(self, ids: Sequence[int], *, num_prompt: int = 0, turns: Sequence[Turn] | None = None) -> Reading:
        """Convert a row, in time that is linear in its length.

        Args:
            ids: The token ids of one row, without padding.
            num_prompt: The number of tokens of the prompt. 0 if there is none, or if it is not known.
            turns: The parts of the row whose text the augment reads. Default is all of it.
        """
        cutter = self.cutter(num_prompt=num_prompt)
        anchor_ends: list[int] = []
        whole = turns is None
        found: list[Placed] = [] if self.other.bos_id is None or not whole else [(self.other.bos_id, 0, 0)]
        for turn in [Turn(0, len(ids), ())] if turns is None else turns:
            self._feed(cutter, ids[len(anchor_ends) : turn.start], anchor_ends)
            cutter.close()
            found += self.place(turn.before, end=cutter.num_characters, column=max(0, turn.start - 1))
            pieces = self._feed(cutter, ids[len(anchor_ends) : turn.stop], anchor_ends)
            if has_end := turn.stop > turn.start and ids[turn.stop - 1] in self._ends:
                # The position that predicts the end does not see that the text is over.
                cutter.column -= 1
                if turn.stop == len(ids):
                    # The end-of-sequence token counts as one character after the text.
                    anchor_ends[-1] = cutter.finish() + 1
            found += self.encode([*pieces, *cutter.close()], is_whole=whole)
            if has_end:
                end = [self.other.eos_id] if whole and turn.stop == len(ids) else turn.end
                found += [(token, anchor_ends[-1], cutter.column) for token in end]
                cutter.column += 1
        self._feed(cutter, ids[len(anchor_ends) :], anchor_ends)
        tokens, ends, columns = (list(part) for part in zip(*found, strict=True)) if found else ([], [], [])
        return Reading(tokens, ends, columns, anchor_ends)

    @staticmethod
    def _feed(cutter: Cutter, ids: Sequence[int], anchor_ends: list[int]) -> list[Piece]:
        pieces = []
        for token in ids:
            pieces += cutter.feed(token)
            anchor_ends.append(cutter.num_characters)
        return pieces
