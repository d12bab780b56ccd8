"""Two processes, under DDP and under FSDP2, give what one process gives on the whole batch."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_align.models.checkpoint import main
from lightning_align.models.pretrained import PretrainedLM
from tests.distributed.harness import launch
from tests.distributed.train import CASES, RESUMED, STRATEGIES, build, checkpoint_of, full, measure, run
from tests.toys import VOCABULARY, largest_difference, tiny_palm

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).parent / "train.py"
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def test_two_processes_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases and both strategies in one start, as most of a process's time goes into its imports.

    Checkpoints of either layout are gone on from in both.
    """
    one = tmp_path / "one"
    one.mkdir()
    torch.save(tiny_palm().state_dict(), one / "base.pt")
    torch.manual_seed(0)
    PretrainedLM(config={**LLAMA}).model.save_pretrained(one / "llama")
    for case in RESUMED:
        run(case, lambda _: "auto", 1, one, resumed=True)
    for strategy in STRATEGIES:
        shutil.copytree(one, tmp_path / strategy)
    launch(SCRIPT, str(tmp_path))
    alone = {case: run(case, lambda _: "auto", 1, one) for case in CASES}
    for strategy in STRATEGIES:
        check(strategy, tmp_path / strategy, alone, monkeypatch)


def check(strategy: str, folder: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the two ranks of a strategy with one process, and go on from their checkpoints in one."""
    ranks: list[Any] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    if strategy == "ddp":
        five = [measure(size, lambda _: "auto", 1, folder) for size in range(1, 6)]
        assert len(five[0]) >= 11 and all(math.isfinite(value) for value in five[0].values())
        for values in (*five, *ranks[0].pop("five pairs"), *ranks[1].pop("five pairs")):
            assert values == pytest.approx(five[0], rel=1e-6, abs=1e-6)
    exported = load_file(folder / "export" / "model.safetensors")
    assert all(largest_difference(exported, rank["exported", False]) == 0 for rank in ranks)
    for case, expected in alone.items():
        torch.manual_seed(0)
        module, _ = build(case, folder)
        module.configure_model()
        start = full(module.policy)
        assert largest_difference(expected["state"], start) > 1e-4, "it did not move, so agreement would say nothing"
        results = {(rank, how): ranks[rank][case, how] for rank in range(2) for name, how in ranks[rank] if name == case}
        if case in RESUMED:
            path = checkpoint_of(case, folder, 2)
            assert path.is_dir() == (strategy == "fsdp2" and case in ("dpo", "pretrained", "moving"))
            if path.is_dir():
                monkeypatch.setattr("sys.argv", ["checkpoint", str(path), str(folder / "whole.ckpt")])
                main()
                path = folder / "whole.ckpt"
            opened = run(case, lambda _: "auto", 1, folder, opened=path)
            assert largest_difference(opened["state"], expected["state"]) < 1e-6, case
        for how, result in results.items():
            assert largest_difference(result["state"], expected["state"]) < 1e-6, (case, how)
            assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6), case
            assert {"val/loss", "train/grad_norm"} <= result["metrics"].keys()
            assert result["texts"][:1] == expected["texts"], case
            if case.startswith("moving"):
                assert largest_difference(result["average"], expected["average"]) < 1e-6, case
                assert result["sharded"] == (strategy == "fsdp2")
            if case in ("dpo", "moving_lora"):
                assert abs(result["metrics"]["val/kl/reference"]) > 1e-4  # of a few samples; of either sign
            if case in ("dpo", "pretrained"):
                assert largest_difference(result["reference"], start) == 0
                assert result["sharded"] == (strategy == "fsdp2")
