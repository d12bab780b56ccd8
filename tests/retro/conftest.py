"""A small retrieval database, built once per session."""

from pathlib import Path

import pytest

from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retro.indexing import build_database

SIZE = 8
TEXTS = {
    "a": "the quick brown fox jumps over the lazy dog",
    "b": "the quick brown cat sleeps under the warm sun all day long",
    "c": "x",
    "d": "a lazy dog and a quick brown fox meet at noon, and then they part",
}
HELD_OUT = {"v": "the quick brown dog jumps at noon", "w": "é warm sun"}


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> RetrievalDatabase:
    """Build a database with chunks of 8 bytes, three neighbors per chunk and a query set `validation`."""
    root = tmp_path_factory.mktemp("retro")
    for name, texts in (("documents", TEXTS), ("held_out", HELD_OUT)):
        (root / name).mkdir()
        for file, text in texts.items():
            (root / name / f"{file}.txt").write_text(text, encoding="utf-8")
    return build_database(
        Path(root / "database"),
        str(root / "documents"),
        encoder="bm25",
        queries={"validation": str(root / "held_out")},
        chunk_size=SIZE,
        k=3,
    )
