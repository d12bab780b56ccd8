"""The tokenizer of a database: what it must do, what identifies it, and the type that holds its ids."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_align.types import MarkedText


class ChunkTokenizer(Protocol):
    """Tokenizer that also reports where in a text each chunk begins."""

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    fingerprint: str

    def encode(self, texts: Sequence[str], *, start: int, step: int) -> Iterable[MarkedText]:
        """Encode each text, and mark where its tokens number start, start + step, start + 2 * step, ... begin."""
        ...

    def ids(self, texts: Sequence[str]) -> Iterable[NDArray[Any]]:
        """Encode each text without marks, which can be much faster. The ids are the same."""
        ...

    def split_point(self, text: str) -> int:
        """Return a place in a text such that what is before it has the same ids, whatever follows. 0 if unknown."""
        ...

    def part(self, text: str, *, is_first: bool) -> MarkedText:
        """Encode a part of a text, with a mark for each token."""
        ...

    def part_ids(self, text: str, *, is_first: bool) -> NDArray[Any]:
        """Encode a part of a text without marks."""
        ...


def tokenizer_key(tokenizer: ChunkTokenizer) -> dict[str, Any]:
    """Return all that can be known of a tokenizer: its own hash, its special ids, and the ids that it gives a text."""
    special = {name: getattr(tokenizer, name) for name in ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id")}
    (probe,) = tokenizer.ids([_PROBE])
    return {**special, "probe": hashlib.sha256(np.asarray(probe, dtype=np.int64).tobytes()).hexdigest()[:16]}


_PROBE = "The naïve fox_jumpsOver 12,345 dogs.\n\tif (x != 0) { return 東京都; }\r\n  Größe e\u0301 <s> [UNK] \U0001f600"


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Return the smallest integer type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32
