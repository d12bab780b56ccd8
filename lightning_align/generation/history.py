"""Filters that depend on the tokens before: the repetition penalty and no-repeat n-grams. Nothing waits for the device."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_align.runtime.transfer import to_device


class Repetition(Protocol):
    """The settings of these filters. `GenerationConfig` has them."""

    repetition_penalty: float
    no_repeat_ngram_size: int


class History:
    """The tokens of each row so far, prompt and response.

    Args:
        prompts: The ids of each prompt.
        room: The maximum number of tokens to append to a row.
        copies: The number of rows per prompt.
        device: The device of the logits.
        settings: The settings of the filters.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], *, room: int, copies: int, device: torch.device, settings: Repetition
    ) -> None:
        self._penalty, self._size = settings.repetition_penalty, settings.no_repeat_ngram_size
        self.active = self._penalty != 1 or self._size > 0
        """Whether a filter is on. If not, nothing is stored."""
        if not self.active:
            return
        rows = [list(prompt) for prompt in prompts for _ in range(copies)]
        self.tokens = torch.zeros(len(rows), max(map(len, rows)) + room, dtype=torch.long)
        for row, prompt in zip(self.tokens, rows, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self.tokens = self.tokens.to(device, non_blocking=True)
        self.lengths = to_device([len(row) for row in rows], device)

    def append(self, tokens: Tensor) -> None:
        """Append a token (B,) to each row. Further tokens of a full row replace its last one, because it has ended."""
        if not self.active:
            return
        places = self.lengths.clamp(max=self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, places[:, None], tokens[:, None])
        self.lengths = (self.lengths + 1).clamp(max=self.tokens.shape[1])

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, int64 indices."""
        if self.active:
            self.tokens, self.lengths = self.tokens.index_select(0, rows), self.lengths.index_select(0, rows)

    def join(self, other: "History", *, room: int) -> None:
        """Append the rows of another history. `room` is the maximum number of tokens to append to a row from now on."""
        if not self.active:
            return
        width = max(int(self.lengths.max()), int(other.lengths.max())) + room
        # A negative padding removes columns that no row needs any more.
        self.tokens = torch.cat([F.pad(tokens, (0, width - tokens.shape[1])) for tokens in (self.tokens, other.tokens)])
        self.lengths = torch.cat((self.lengths, other.lengths))

    def filtered(self, logits: Tensor) -> Tensor:
        """Apply the repetition penalty and then the n-gram filter to the logits, (B, V). The input is not changed."""
        if not self.active:
            return logits
        logits = logits.float()
        exists = torch.arange(self.tokens.shape[1], device=logits.device) < self.lengths[:, None]
        if self._penalty != 1:
            logits = penalize_repetition(logits, self.tokens, exists, penalty=self._penalty)
        if self._size:
            logits = forbid_ngrams(logits, self.tokens, exists, size=self._size)
        return logits


def penalize_repetition(logits: Tensor, tokens: Tensor, exists: Tensor, *, penalty: float) -> Tensor:
    """Make the tokens of each row less likely (CTRL, Keskar et al. 2019, arXiv 1909.05858, section 4.1).

    Positive logits are divided by the penalty and negative ones are multiplied by it, as in transformers. A token that occurs
    several times is penalized once. Prompts count too.

    Args:
        logits: The logits, (B, V).
        tokens: The tokens of each row, (B, N) int64.
        exists: Which of these are tokens, (B, N) bool. The others are padding.
        penalty: The penalty. 1 changes nothing, and less than 1 makes the tokens more likely.
    """
    counts = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, tokens, exists.int())
    return torch.where(counts > 0, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid_ngrams(logits: Tensor, tokens: Tensor, exists: Tensor, *, size: int) -> Tensor:
    """Set the logits of tokens that would repeat an n-gram of the row to -inf (Paulus et al. 2017, arXiv 1705.04304, 2.5).

    Args:
        logits: The logits, (B, V).
        tokens: The tokens of each row, (B, N) int64, padded on the right.
        exists: Which of these are tokens, (B, N) bool.
        size: n, the number of tokens of an n-gram. With 1, no token occurs twice.
    """
    if tokens.shape[1] < size:
        return logits
    grams = tokens.unfold(1, size, 1)  # (B, N - n + 1, n)
    complete = exists[:, size - 1 :]
    lengths = exists.sum(dim=1, keepdim=True)
    # The last n - 1 tokens of each row. A row that is shorter than that has no complete n-gram.
    last = (lengths - size + 1 + torch.arange(size - 1, device=tokens.device)).clamp(min=0)
    same = (grams[:, :, :-1] == tokens.gather(1, last)[:, None]).all(dim=2) & complete
    counts = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, grams[:, :, -1], same.int())
    return logits.masked_fill(counts > 0, -torch.inf)
