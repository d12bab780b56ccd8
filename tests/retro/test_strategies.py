"""Tests that two processes, with DDP and with FSDP2, give the same results as one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.retrieval.database import RetrievalDatabase
from tests.distributed.harness import launch
from tests.retro.toys import tiny_retro
from tests.retro.train import SIZE, run
from tests.toys import largest_difference, state_of, tiny_palm

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(database: RetrievalDatabase, strategy: str, tmp_path: Path) -> None:
    launch(Path(__file__).parent / "train.py", strategy, str(database.folder), str(tmp_path))
    ranks: list[Any] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = run("auto", 1, str(database.folder), tmp_path)
    start = state_of(tiny_retro(decoder=tiny_palm(num_tokens=259, depth=3), chunk_size=SIZE, dtype=torch.float64))
    assert largest_difference(alone["state"], start) > 1e-4, "the weights did not change, so the comparison is meaningless"
    for rank in ranks:
        assert largest_difference(rank["state"], alone["state"]) < 1e-12
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)
        assert rank["texts"][:1] == alone["texts"]
