"""Ranks that hold the parts of one model train as one process does, also with FSDP2 over several of such groups."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.models.checkpoint import main
from tests.distributed import train
from tests.distributed.harness import launch
from tests.distributed.tensor import CASES, FAMILIES, REFUSED, build, family, loss_and_gradients
from tests.distributed.train import checkpoint_of, run
from tests.toys import largest_difference

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("tensor.py")
TIGHT = 1e-6


@pytest.mark.parametrize("ranks", [2, 4])
def test_split_models_train_as_one_process(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients, weights and texts; checkpoints of either layout are gone on from in both."""
    monkeypatch.setattr(train, "build", build)
    cases = CASES if ranks == 2 else CASES[1:3]
    alone: dict[str, Any] = {}
    for case in cases:
        run(case, lambda _: "auto", 1, tmp_path, resumed=True)
        alone[case] = run(case, lambda _: "auto", 1, tmp_path)
    launch(SCRIPT, str(tmp_path), ranks=ranks)
    results: list[Any] = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for case in cases:
        path = checkpoint_of(case, tmp_path, ranks)
        assert path.is_dir() == case.endswith("palm")
        if path.is_dir():
            monkeypatch.setattr("sys.argv", ["checkpoint", str(path), str(tmp_path / "whole.ckpt")])
            main()
            path = tmp_path / "whole.ckpt"
        opened = run(case, lambda _: "auto", 1, tmp_path, opened=path)
        assert largest_difference(opened["state"], alone[case]["state"]) < TIGHT, case
        for result in results:
            for how in ("", " resumed", " opened"):
                ours, theirs = result[case + how], alone[case]
                assert largest_difference(ours["state"], theirs["state"]) < TIGHT, case + how
                assert largest_difference(ours["gradients"], theirs["gradients"]) < TIGHT, case + how
                assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5, abs=1e-6), case + how
                assert ours["texts"][:1] == theirs["texts"], case + how
            if case.startswith("dpo"):
                assert result[case]["sharded"]
    for result in results if ranks == 2 else ():
        for name, (_, message) in REFUSED.items():
            assert message in result["refused"][name], name
            assert "data_parallel_size" in result["refused"][name], name
        for name in FAMILIES:
            logits, gradients = loss_and_gradients(family(name))
            ours, theirs = result["families"][name]
            assert (ours - logits).abs().max() < TIGHT * 10, name
            assert largest_difference(theirs, gradients) < TIGHT, name
