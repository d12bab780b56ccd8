"""The batch types that several packages share, and the legend of the shape letters that every file uses.

Legend: ``B`` rows of a batch, ``N`` positions of a row, ``V`` vocabulary size, ``D`` model width, ``H`` attention heads, ``K``
head width, ``T`` selected (response) positions of a whole batch, ``S`` columns of a key-value cache.
"""

from typing import Any, NamedTuple, NotRequired, TypedDict

from numpy.typing import NDArray
from torch import Tensor


class TokenBatch(TypedDict):
    """Rows of tokens, padded on the right.

    Consumers rely on right padding: under causal attention no real token can attend to padding, so models that accept only
    tokens need no mask.
    """

    tokens: Tensor
    """(B, N) int64 token ids."""
    mask: Tensor
    """(B, N) bool, true at real tokens."""
    targets: Tensor
    """(B, N) bool, true at the tokens that are predicted and trained on: the response and its end-of-sequence token."""
    num_bytes: NotRequired[Tensor]
    """(B,) int64 number of UTF-8 bytes of the target text. It is the denominator of bits per byte."""
    rows: NotRequired[Tensor]
    """(B,) int64 index of each row in its source, so that a result can be traced back to its line."""
    target_weights: NotRequired[Tensor]
    """(B, N) float32 weight of each target's log-prob in the sum of its row. Without this entry all weights are 1."""
    num_targets: NotRequired[int]
    """The number of targets of the batch. With it, the targets of a batch on a GPU are found without waiting for the GPU.
    Remove it if you change ``targets``."""
    num_tokens: NotRequired[int]
    """The number of real tokens of the batch, without those of the first column, which are never targets."""
    lengths: NotRequired[list[int]]
    """The number of real tokens of each row, or of each document of a packed batch. With it, a batch on a GPU is computed
    without its padding. Remove it if you change ``mask``."""
    prefixes: NotRequired[Any]
    """The common beginnings of the rows (`lightning_align.models.shared_rows.PrefixPlan`), which are then computed once. Remove
    it if you change ``tokens``, ``mask`` or ``targets``."""
    document_ids: NotRequired[Tensor]
    """(B, N) int64. Only in a packed batch, whose rows are sequences of several documents: the number of the document that each
    token belongs to, from 0 and in ascending order over the whole batch, and -1 at padding. Attention stays within a document.
    Its first token is not a target. ``rows`` and ``num_bytes`` and all results then have one entry per document."""


class PreferenceBatch(TypedDict):
    """Preference pairs. Row ``b`` of ``chosen`` is preferred over row ``b`` of ``rejected``."""

    chosen: TokenBatch
    rejected: TokenBatch
    weights: NotRequired[Tensor]
    """(B,) float32 factor on the loss of each pair."""
    margins: NotRequired[Tensor]
    """(B,) float32 margin by which the reward of ``chosen`` should exceed that of ``rejected``."""
    prefixes: NotRequired[Any]
    """The common beginnings of all rows, chosen rows first; see `TokenBatch`. None if they are not shared."""
    reference: NotRequired["LogProbs"]
    """(2B,) log-probs under the reference, chosen rows first. Present only if they were computed in advance."""


class SelfPlayBatch(TypedDict):
    """Real and generated responses to the same prompts, with their log-probs under the opponent."""

    pairs: TokenBatch
    """(2B, N) tokens: B real rows, then B generated rows in the same order."""
    opponent: Tensor
    """(2B,) float32 log-probs of these responses under the opponent: sums over each response, in nats."""


class PromptBatch(TypedDict):
    """Prompts to continue. They may differ in length and are not padded."""

    prompts: list[list[int]]
    rows: Tensor
    """(B,) int64 index of each prompt in its source."""


class LogProbs(NamedTuple):
    """Log-probabilities of the responses of a batch, in float32."""

    sums: Tensor
    """(B,) sum over the target tokens of each row, in nats."""
    counts: Tensor
    """(B,) int64 number of target tokens of each row."""

    @property
    def means(self) -> Tensor:
        """(B,) mean per target token, in nats. It is 0 for a row without targets."""
        return self.sums / self.counts.clamp(min=1)


class Document(NamedTuple):
    """A text with an id."""

    id: str
    """A name by which a person can find the document, such as a path or a row. It is unique within a source."""
    text: str


class MarkedText(NamedTuple):
    """The token ids of a document, and the positions of some tokens in its text."""

    ids: NDArray[Any]
    """(L,) token ids, without special tokens."""
    marks: list[int]
    """The offset in the text, in characters, at which each requested token begins."""
