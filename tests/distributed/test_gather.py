"""FSDP2 under mixed precision: bfloat16 gathers, float32 reductions once per optimizer batch, and no whole model in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.gather import run
from tests.distributed.harness import launch
from tests.toys import largest_difference, state_of, tiny_palm

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SCRIPT = Path(__file__).parent / "gather.py"
METHODS = ("sft", "dpo")
GROUPS = 3  # two blocks and the rest


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Run all cases in one start."""
    folder = tmp_path_factory.mktemp("gather")
    launch(SCRIPT, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_reduced_once_per_optimizer_batch(method: str, ranks: list[Any]) -> None:
    for rank in ranks:
        for precision in ("32-true", "bf16-mixed", "bf16-true"):
            reduced = {name: count for name, count in rank[method, precision]["collectives"].items() if "reduce" in name}
            assert reduced == {"reduce torch.float32": GROUPS}, precision


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_gathered_in_the_dtype_of_products(method: str, ranks: list[Any]) -> None:
    for rank in ranks:
        for precision, dtype in (("32-true", "float32"), ("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16")):
            gathered = {name for name in rank[method, precision]["collectives"] if "gather" in name}
            # Bytes of mixed dtypes travel as uint8.
            assert gathered <= {f"gather torch.{dtype}"} and gathered, precision
        assert rank[method, "bf16-mixed"]["dtypes"] == ["torch.float32"], "the shards of the optimizer"


@pytest.mark.parametrize("method", METHODS)
def test_no_cast_copy_of_the_model_stays(method: str, ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank[method, "bf16-mixed"]["alive"] < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one_process(method: str, ranks: list[Any], tmp_path: Path) -> None:
    """To rounding in float32. In bfloat16, gains and embeddings are rounded too, which autocast does not do."""
    start = state_of(tiny_palm())
    alone = {p: run(method, p, 1, tmp_path, strategy="auto") for p in ("32-true", "bf16-mixed")}
    for rank in ranks:
        assert largest_difference(rank[method, "32-true"]["state"], alone["32-true"]["state"]) < 1e-6
        mixed = rank[method, "bf16-mixed"]
        far = {name: value - start[name] for name, value in alone["bf16-mixed"]["state"].items()}
        apart = {name: mixed["state"][name] - start[name] - value for name, value in far.items()}
        norm, error = (sum(float(v.square().sum()) for v in side.values()) ** 0.5 for side in (far, apart))
        assert error < 0.05 * norm
        loss = rank[method, "32-true"]["metrics"]["train/loss"]  # of the rows of this rank
        assert mixed["metrics"]["train/loss"] == pytest.approx(loss, rel=0.02)
        # Within autocast and outside of it.
        for how in ("scored", "outside"):
            torch.testing.assert_close(mixed[how], rank[method, "32-true"][how], rtol=0.02, atol=0.3)
        assert mixed["texts"] == rank[method, "32-true"]["texts"] or len(mixed["texts"][0]) == 4


def test_policy_and_sharded_reference_start_equal(ranks: list[Any]) -> None:
    for rank in ranks:
        for precision in ("32-true", "bf16-mixed", "bf16-true"):
            metrics = rank["dpo", precision]["metrics"]
            assert metrics["train/rewards/chosen"] == metrics["train/rewards/rejected"] == 0, precision
