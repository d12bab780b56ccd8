"""Batches that travel between the rooms, and the shape legend that every file uses.

Legend: ``B`` rows of a batch, ``N`` positions of a row, ``V`` vocabulary, ``D`` model width, ``H`` heads, ``K`` head
    width,
``T`` selected (response) positions of a whole batch, ``S`` columns of a key-value cache.
"""

from typing import Any, NamedTuple, NotRequired, TypedDict

from numpy.typing import NDArray
from torch import Tensor


class TokenBatch(TypedDict):
    """Token rows, padded on the right.

    Right padding is part of the contract: under causal attention no real position can then see a pad, so models that
    take tokens only need no mask.
    """

    tokens: Tensor
    """(B, N) int64 token ids."""
    mask: Tensor
    """(B, N) bool, true at real tokens."""
    targets: Tensor
    """(B, N) bool, true at the tokens that are predicted and trained: the response and its end-of-sequence token."""
    num_bytes: NotRequired[Tensor]
    """(B,) int64, UTF-8 bytes of the text that the targets spell; what bits per byte divide by."""
    rows: NotRequired[Tensor]
    """(B,) int64, index of each row in its source, so that a result can be traced back to its line."""
    target_weights: NotRequired[Tensor]
    """(B, N) float32, what the log-prob of each target counts in the sum of its row; 1 where there are none."""


class PreferenceBatch(TypedDict):
    """Pairs: row ``b`` of ``chosen`` is preferred over row ``b`` of ``rejected``."""

    chosen: TokenBatch
    rejected: TokenBatch
    weights: NotRequired[Tensor]
    """(B,) float32, what the loss of each pair is multiplied with."""
    margins: NotRequired[Tensor]
    """(B,) float32, by how much the reward of chosen should exceed that of rejected."""
    reference: NotRequired["LogProbs"]
    """(2B,) log-probs under the reference, chosen rows first, where they are known beforehand."""


class SelfPlayBatch(TypedDict):
    """Real and generated responses to the same prompts, and what the opponent thinks of them."""

    pairs: TokenBatch
    """(2B, N): B real rows, then B generated rows in the same order."""
    opponent: Tensor
    """(2B,) float32, log-probs of these responses under the opponent, sums in nats."""


class PromptBatch(TypedDict):
    """Prompts to continue, of any lengths, unpadded."""

    prompts: list[list[int]]
    rows: Tensor
    """(B,) int64, index of each prompt in its source."""


class LogProbs(NamedTuple):
    """Log-probabilities of the responses of a batch, in float32."""

    sums: Tensor
    """(B,) sum over the target tokens of each row, in nats."""
    counts: Tensor
    """(B,) int64 number of target tokens of each row."""

    @property
    def means(self) -> Tensor:
        """(B,) mean per target token; 0 where a row has no target."""
        return self.sums / self.counts.clamp(min=1)


class Document(NamedTuple):
    """A text with a name."""

    id: str
    """What people find it by: a path, a row. Different in every document of a source."""
    text: str


class MarkedText(NamedTuple):
    """The ids of a document, and where some of them stand in its text."""

    ids: NDArray[Any]
    """(L,) token ids, without special tokens."""
    marks: list[int]
    """Where in the text, in characters, the tokens begin that were asked for."""
