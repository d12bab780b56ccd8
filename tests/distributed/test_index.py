"""Two ranks that share the work of an index leave the bytes that one rank leaves."""

from pathlib import Path

import pytest

from lightning_align.retrieval.database import RetrievalDatabase
from tests.distributed.harness import launch
from tests.distributed.index import checkpoint, fit
from tests.retrieval.helpers import hashes

pytestmark = pytest.mark.distributed


def test_two_ranks_build_what_one_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("chunks.BLOCK_BYTES", "encoders.BLOCK_CHUNKS", "neighbors.BLOCK_CHUNKS"):
        monkeypatch.setattr(f"lightning_align.retrieval.{room}", 64)  # so that what `fit` sets is taken back
    encoder = checkpoint(tmp_path / "encoder.ckpt")
    launch(Path(__file__).parent / "index.py", str(tmp_path))
    fit(tmp_path / "one", encoder, strategy="auto", devices=1)
    assert len(RetrievalDatabase.open(tmp_path / "two").chunks) > 300
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
