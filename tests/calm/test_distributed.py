"""Tests that a resumed run on two processes, under DDP and under FSDP2, gives the same result as one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calm.toys import composed
from tests.calm.train_distributed import run
from tests.distributed.harness import launch
from tests.toys import largest_difference, state_of

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("strategy", "recompute"), [("ddp", ""), ("fsdp2", ""), ("ddp", "recompute"), ("fsdp2", "recompute")])
def test_two_processes_equal_one(strategy: str, recompute: str, tmp_path: Path) -> None:
    start = composed(torch.float64)
    start.save_connections(tmp_path / "connections.safetensors")
    launch(Path(__file__).parent / "train_distributed.py", strategy, str(tmp_path), recompute)
    ranks: list[Any] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = run(lambda: "auto", 1, tmp_path)
    assert largest_difference(alone["state"], state_of(start)) > 1e-3, "the weights must change, or the test shows nothing"
    for rank in ranks:
        assert rank["world"] == 2
        assert largest_difference(rank["state"], alone["state"]) < 1e-12
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)
        assert rank["texts"] == alone["texts"]
