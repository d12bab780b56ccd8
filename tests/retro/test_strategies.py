"""Tests that two processes, with DDP and with FSDP2, give the same results as one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.retrieval.database import RetrievalDatabase
from tests.distributed.harness import launch
from tests.retro.train import build, run
from tests.toys import largest_difference, state_of

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("kind", ["own", "reuse"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(database: RetrievalDatabase, strategy: str, kind: str, tmp_path: Path) -> None:
    if kind == "reuse":
        pytest.importorskip("transformers", reason="needs transformers")
    launch(Path(__file__).parent / "train.py", strategy, str(database.folder), str(tmp_path), kind)
    ranks: list[Any] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = run("auto", 1, str(database.folder), tmp_path, kind)
    start = state_of(build(kind))
    assert largest_difference(alone["state"], start) > 1e-4, "the weights did not change, so the comparison is meaningless"
    for rank in ranks:
        assert largest_difference(rank["state"], alone["state"]) < 1e-12
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)
        assert rank["texts"][:1] == alone["texts"]
