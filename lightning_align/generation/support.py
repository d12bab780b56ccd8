"""The token ids that exist. Padded vocabularies have rows of the output layer that stand for no token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Support:
    """The ids that the tokenizer has: 0 to `size` - 1 without `holes`. No other id is drawn.

    Args:
        size: The largest id plus 1. None means that the tokenizer is unknown, so that every id exists.
        holes: The ids below `size` that stand for no token.
    """

    size: int | None = None
    holes: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Any) -> "Support":
        """Return the support of a tokenizer. Added tokens belong to it. Without a tokenizer, every id exists."""
        size = getattr(tokenizer, "vocab_size", None)
        return cls() if size is None else cls(int(size), frozenset(getattr(tokenizer, "holes", ())))

    def __contains__(self, token: int) -> bool:
        return self.size is None or (0 <= token < self.size and token not in self.holes)

    def missing(self, tokens: Iterable[int]) -> list[int]:
        """Return the ids that do not exist, in their order."""
        return [token for token in tokens if token not in self]

    def num_absent(self, vocabulary: int) -> int:
        """Return how many of the ids of a model stand for no token.

        Args:
            vocabulary: V, the number of rows of the output layer.
        """
        if self.size is None:
            return 0
        return max(0, vocabulary - self.size) + sum(hole < vocabulary for hole in self.holes)

    def absent(self, vocabulary: int, device: torch.device) -> Tensor | None:
        """Return which ids of a model stand for no token, (V,) bool. None if every id exists."""
        if not self.num_absent(vocabulary):
            return None
        absent = torch.zeros(vocabulary, dtype=torch.bool)
        absent[self.size :] = True
        absent[[hole for hole in self.holes if hole < vocabulary]] = True
        return absent.to(device, non_blocking=True)
