"""Ranks that share the work of an index leave the bytes that one rank leaves, also if one of them dies and all are repeated."""

import time
from pathlib import Path

import pytest

from lightning_align.retrieval.database import RetrievalDatabase
from tests.distributed.harness import end_ranks, launch, start_ranks
from tests.distributed.index import checkpoint, fit
from tests.retrieval.helpers import hashes

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).parent / "index.py"
INDEPENDENT = {"NODE_RANK": "0"}
LIMIT, START = 60.0, 400.0
"""Seconds from the loss of a rank to the end of the others, and for imports and the first blocks on a loaded machine."""


def test_two_ranks_build_what_one_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("chunks.BLOCK_BYTES", "encoders.BLOCK_CHUNKS", "neighbors.BLOCK_CHUNKS"):
        monkeypatch.setattr(f"lightning_align.retrieval.{room}", 64)  # so that what `fit` sets is taken back
    encoder = checkpoint(tmp_path / "encoder.ckpt")
    launch(SCRIPT, str(tmp_path), "2", "nobody watched")
    fit(tmp_path / "one", encoder, strategy="auto", devices=1)
    assert len(RetrievalDatabase.open(tmp_path / "ranks").chunks) > 300
    assert hashes(tmp_path / "ranks") == hashes(tmp_path / "one")


def test_four_ranks_resume_what_a_rank_that_died_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("chunks.BLOCK_BYTES", "encoders.BLOCK_CHUNKS", "neighbors.BLOCK_CHUNKS"):
        monkeypatch.setattr(f"lightning_align.retrieval.{room}", 64)
    encoder, ranks, lost = checkpoint(tmp_path / "encoder.ckpt"), range(4), 2
    outputs = [tmp_path / f"{rank}.txt" for rank in ranks]
    processes = start_ranks(SCRIPT, (str(tmp_path), "4", str(lost)), outputs, INDEPENDENT)
    began = time.monotonic()
    while not (tmp_path / "lost").exists() and time.monotonic() - began < START:
        time.sleep(0.1)
    began = time.monotonic()
    while any(process.exitcode is None for process in processes) and time.monotonic() - began < LIMIT:
        time.sleep(0.1)
    codes = end_ranks(processes)
    told = [output.read_text() for output in outputs]
    assert codes[lost] == -9, told[lost]
    for rank in ranks:
        assert rank == lost or (codes[rank] not in (None, 0) and f"Rank {lost} died" in told[rank]), told[rank]
    kept = {f"{path.parents[2].name}/{int(path.name[:8])}" for path in tmp_path.glob("ranks/vectors-*/blocks/*/*.npz")}
    assert len(kept) >= len(ranks)
    (tmp_path / "published").unlink()
    launch(SCRIPT, str(tmp_path), "4", "nobody", ranks=4)
    published = (tmp_path / "published").read_text().split()
    assert len(set(published)) == len(published) and kept.isdisjoint(published)  # nothing is encoded twice
    fit(tmp_path / "one", encoder, strategy="auto", devices=1)
    # The manifests name all blocks, and so do the hashes of the files: nothing is lost.
    assert hashes(tmp_path / "ranks") == hashes(tmp_path / "one")
    number = -(-len(RetrievalDatabase.open(tmp_path / "one").chunks) // 64)
    assert len({name for name in (*kept, *published) if name.startswith(next(iter(kept)).split("/")[0])}) == number
