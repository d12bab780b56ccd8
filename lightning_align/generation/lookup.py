"""Prompt lookup: guesses at the next tokens of a row, taken from where it has the same last tokens before.

Several guessed tokens are read in one pass, which costs little more than one token where the weights are read from memory. Each
position then draws its token with its own random number, as it does without guesses. Guesses are kept as long as they are what
is drawn, so that the response does not depend on them. See Saxena 2023, "Prompt lookup decoding", and for drafts of another
model Leviathan et al. 2023, arXiv 2211.17192.
"""

from collections.abc import Sequence

SIZES = (3, 2)
"""The numbers of last tokens that must be the same, in the order in which they are tried."""


class PromptLookup:
    """The tokens of a row, prompt and response, and what followed each pair and triple of them last.

    Args:
        tokens: The tokens so far.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            place = len(self.tokens)
            for size in SIZES:
                if place >= size:
                    self._next[tuple(self.tokens[-size:])] = place
            self.tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Return `most` tokens that followed the last tokens before, or none. What goes on to the end is taken to repeat."""
        length = len(self.tokens)
        for size in SIZES:
            place = self._next.get(tuple(self.tokens[-size:])) if length >= size else None
            if place is not None:
                return [self.tokens[place + number % (length - place)] for number in range(most)]
        return []
