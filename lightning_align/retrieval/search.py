"""Live retrieval: what generation asks for the neighbors of tokens that nobody has seen before."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from numpy.typing import ArrayLike

from lightning_align.retrieval.tables import Bools, Floats, Ints, Tokens


class Found(NamedTuple):
    """The neighbors of n queries, nearest first."""

    ids: Ints
    """(n, k) chunk numbers; 0 where the mask is false."""
    mask: Bools
    """(n, k) whether there is such a neighbor; the false ones stand behind the true ones."""
    distances: Floats
    """(n, k) the smaller the nearer; infinite where there is none."""
    tokens: Tokens
    """(n, k, 2m) each neighbor with its continuation; all padding where there is none."""


class Retriever(Protocol):
    """What finds chunks that are like given tokens."""

    @property
    def chunk_size(self) -> int:
        """Tokens a chunk (m): what one query should have."""
        ...

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer whose ids the queries must be."""
        ...

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """Find the k nearest chunks of each query.

        Args:
            queries: n runs of token ids, a chunk each, unpadded.
            k: how many; where there are fewer, slots are masked.
            exclude: for each query the ids of documents that must not be returned.
        """
        ...
