"""Two processes play what one process plays: the same responses, the same training, resumed or not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import launch
from tests.distributed.spin import run
from tests.spin.runs import exact_palm, set_rows, write_rows
from tests.toys import gap, largest_difference, state_of

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("strategy", "opponent"), [("ddp", "iterate"), ("fsdp2", "iterate"), ("fsdp2", "mixture"), ("fsdp2", "ema")]
)
def test_two_processes_play_as_one(strategy: str, opponent: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    launch(Path(__file__).parent / "spin.py", strategy, opponent, str(tmp_path / "two"), rows)
    alone = run(tmp_path / "one", rows, lambda: "auto", 1, opponent=opponent)
    assert largest_difference(alone["state"], state_of(exact_palm())) > 1e-3
    for rank in range(2):
        result: Any = torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True)
        # Weights are read and hashed once, by the first rank: at the start of each iteration, and those of a base.
        once = 3 if opponent == "mixture" else 2
        assert result["hashed"] == (0 if rank else once) or (opponent == "ema" and not rank), "the run of `ema` resumes"
        assert largest_difference(result["state"], alone["state"]) < 1e-5
        assert result["average"].keys() == alone["average"].keys()
        for name, value in alone["average"].items():
            assert gap(result["average"][name], value) < 1e-5
        assert result["metrics"] == pytest.approx(alone["metrics"], rel=1e-3, abs=1e-5)
    for iteration in range(2):
        ours, theirs = (
            [[answer["tokens"] for answer in row["generated"]] for row in set_rows(tmp_path / name, iteration)]
            for name in ("one", "two")
        )
        assert ours == theirs
