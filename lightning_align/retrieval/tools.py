"""The settings and components that a database is built and searched with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L

from lightning_align.retrieval.chunks import ChunkTokenizer
from lightning_align.retrieval.encoders import Encoder
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retrieval.lexical import Decode
from lightning_align.retrieval.words import WordsConfig

Kind = Literal["dense", "bm25", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Settings and components that a database is built and searched with."""

    kind: Kind
    """Kind of search."""
    tokenizer: ChunkTokenizer
    decode: Decode
    """Converts token ids to text."""
    encoder: Encoder | None
    """None for BM25 alone."""
    made_with: Mapping[str, Any]
    """How to create the tokenizer and the encoder again. It is written to the head."""
    trainer: Callable[[], L.Trainer]
    """Creates the Trainer that runs the encoder."""
    k: int
    """The number of neighbors per chunk."""
    index: IndexConfig
    verify: float
    """Fraction of the blocks that are computed twice and compared."""
    keep_tokenizer: Callable[[Path], str | None] | None = None
    """Saves the tokenizer in the folder of the database, and returns its name there. None if it cannot be saved."""
    words: WordsConfig = field(default_factory=WordsConfig)
    """How BM25 finds the terms of a text."""
    hide_copies: bool = True
    """Whether near-duplicates of a held-out document are hidden from it. Those of the database's own documents always are."""

    @cached_property
    def encoder_key(self) -> str | None:
        """The fingerprint of the encoder at the first access, before a Trainer converts its weights. None for BM25 alone."""
        return None if self.encoder is None else self.encoder.fingerprint


def check_encoder(head: Mapping[str, Any], tools: Tools) -> None:
    """Check that the encoder is the encoder that the database was built with.

    Args:
        head: The manifest of the database.
        tools: The tools to search or extend it with.

    Raises:
        ValueError: If the fingerprints differ.
    """
    fingerprint = tools.encoder_key
    if head["encoder"] not in (fingerprint, *getattr(tools.encoder, "former_fingerprints", ())):
        raise ValueError(
            f"`encoder` must be the encoder that the database was built with, {head['encoder']}, but got {fingerprint}. "
            "Vectors of different encoders cannot be compared. Use that encoder, or build the database again with this one."
        )
