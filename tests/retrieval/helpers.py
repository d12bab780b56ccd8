"""Small documents and encoders for several tests."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lightning_align.data.documents import DocumentSource, DocumentTokenizer
from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.types import Document

BYTES = DocumentTokenizer(ByteTokenizer())


class Listed(DocumentSource):
    """Documents from a dictionary."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def documents(self) -> Iterator[Document]:
        return (Document(*item) for item in self.texts.items())


class Projection:
    """Encodes a chunk as a random projection of its token frequencies."""

    def __init__(self, dim: int = 8, *, seed: int = 0, vocabulary: int = 259) -> None:
        self.matrix = np.random.default_rng(seed).normal(size=(vocabulary, dim)).astype(np.float32)
        self.fingerprint = f"projection-{dim}-{seed}"
        self.num_encoded = 0

    def encode(self, chunks) -> np.ndarray:
        self.num_encoded += len(chunks)
        return np.stack([self.matrix[np.asarray(chunk)].mean(0) for chunk in chunks])


def texts(num: int, *, words: int = 60, seed: int = 0, prefix: str = "d") -> dict[str, str]:
    """Make documents of random words from a vocabulary of a hundred."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8))) for _ in range(100)]
    return {f"{prefix}{i}": " ".join(draw.choices(lexicon, k=draw.randint(words // 2, words))) for i in range(num)}


def chunk(root: Path, source: dict[str, str] | DocumentSource, *, size: int = 16, verify: float = 1.0) -> Stage:
    source = source if isinstance(source, DocumentSource) else Listed(source)
    return build_chunks(root, source, BYTES, chunk_size=size, team=Team(), verify=verify)


def hashes(root: Path) -> dict[str, str]:
    """Compute the hash of every file below a folder."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_folder(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root
