"""Two processes, under DDP and under FSDP2, give what one process gives on the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import launch
from tests.distributed.train import CASES, build, full, run
from tests.toys import largest_difference, tiny_palm

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).parent / "train.py"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one(strategy: str, tmp_path: Path) -> None:
    """All cases in one start: most of a process's time goes into its imports."""
    torch.save(tiny_palm().state_dict(), tmp_path / "base.pt")
    launch(SCRIPT, strategy, str(tmp_path))
    ranks: list[Any] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for case in CASES:
        alone = run(case, lambda _: "auto", 1, tmp_path)
        torch.manual_seed(0)
        module, _ = build(case, tmp_path)
        module.configure_model()
        start = full(module.policy)
        assert largest_difference(alone["state"], start) > 1e-4, "it did not move, so agreement would say nothing"
        for result in (rank[key] for rank in ranks for key in rank if key[0] == case):
            assert largest_difference(result["state"], alone["state"]) < 1e-6, case
            assert result["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6), case
            assert {"val/loss", "train/grad_norm"} <= result["metrics"].keys()
            assert result["texts"][:1] == alone["texts"], case
            if case.startswith("moving"):
                assert largest_difference(result["average"], alone["average"]) < 1e-6, case
                assert result["sharded"] == (strategy == "fsdp2")
            if case == "dpo":
                assert largest_difference(result["reference"], start) == 0
                assert result["sharded"] == (strategy == "fsdp2")
