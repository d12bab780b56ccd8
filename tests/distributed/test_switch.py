"""A run that changes its number of ranks and its strategy is the run of one process."""

from pathlib import Path

import pytest
import torch

from tests.conftest import FULL
from tests.distributed.harness import launch
from tests.distributed.switch import PHASES, go_on, whole
from tests.toys import largest_difference
from tests.training.places import METHODS

pytestmark = [pytest.mark.distributed, pytest.mark.study]
SCRIPT = Path(__file__).with_name("switch.py")
TOGETHER = ((0,), (1, 2), (3,), (4, 5))
"""The phases that one start of processes trains."""


def test_ranks_and_strategies_change_within_a_run(tmp_path: Path) -> None:
    """One process, DDP, FSDP2, one process, FSDP2, DDP: each part ends by steps and is saved by hand."""
    methods = METHODS if FULL else ("sft", "calm")
    for phases in TOGETHER if FULL else TOGETHER[:3]:
        if PHASES[phases[0]][0] == "auto":
            for method in methods:
                torch.save(whole(go_on(method, tmp_path, phases[0])), tmp_path / f"{method}-{phases[0]}.pt")
        else:
            launch(SCRIPT, str(tmp_path), ",".join(map(str, phases)), *methods)
    for method in methods:
        start, expected = (whole(go_on(method, tmp_path / "alone", until=steps)) for steps in (1, PHASES[phases[-1]][1]))
        found = torch.load(tmp_path / f"{method}-{phases[-1]}.pt", weights_only=True)
        assert largest_difference(found, start) > 1e-3, "it did not train"
        assert largest_difference(found, expected) < 1e-6, method
