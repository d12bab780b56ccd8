"""No rank of a sharded run holds a whole model, and the weights are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import FULL
from tests.distributed.deferred import built, prepare
from tests.distributed.harness import launch

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).parent / "deferred.py"
CASES = ("palm", "lora", "reference", "moving", "config", "folder", "tied", "pretrained")
MEASURED = ("palm", "folder", "pretrained", "lora") if FULL else ("palm", "pretrained")


@pytest.mark.filterwarnings("ignore:Total length of `list`")
def test_no_rank_holds_the_model_but_all_have_its_weights(tmp_path: Path) -> None:
    """All cases in one start of two ranks."""
    for size in ("small", "medium"):
        prepare(size, tmp_path)
    launch(SCRIPT, ",".join(CASES), ",".join(MEASURED), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for case in CASES:
        check_weights(case, tmp_path, [rank[f"small {case}"] for rank in ranks])
    for case in MEASURED:
        check_memory(case, [rank[f"medium {case}"] for rank in ranks])


def check_weights(case: str, folder: Path, ranks: list[Any]) -> None:
    """Bit for bit those of one process, with the state of the random number generator after the build."""
    alone, _, state = built(case, "small", folder, "auto", 1)
    expected = alone.policy.state_dict()
    for rank in ranks:
        assert rank["state"].keys() == expected.keys()
        assert all(torch.equal(rank["state"][name], value) for name, value in expected.items()), case
        assert torch.equal(rank["rng"], state), case
        if case in ("reference", "pretrained"):
            assert rank["hash"] == alone.initial_policy.weights
        assert ("reference" in rank) == (case in ("reference", "pretrained", "moving"))
        if "reference" in rank:
            kept = alone.reference_average if case == "moving" else alone.reference.model
            assert all(torch.equal(rank["reference"][name], value) for name, value in kept.state_dict().items()), case


def check_memory(case: str, ranks: list[Any]) -> None:
    """The peak of memory stays near the shards that a rank keeps. Built whole, it is above 1 for a policy and 2 with a copy.

    The largest seen was 0.65 of the float32 weights.
    """
    models = 2 if case == "pretrained" else 1
    whole = sum(rank["held"] for rank in ranks)
    for rank in ranks:
        share = rank["peak"] / (models * whole)
        print(f"{case}: {whole / 1e6:.0f} MB of weights, peak {share:.2f} of {models} in float32")
        assert rank["held"] <= 0.52 * whole
        assert share <= 0.75, (case, share)
