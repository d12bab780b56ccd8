"""Agreements of ranks: all raise if one fails, and predictions are joined without the group of the training."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_align.spin import boundary
from tests.distributed.harness import launch
from tests.toys import tiny_palm


@pytest.mark.distributed
def test_two_ranks_agree_and_write_their_predictions(tmp_path: Path) -> None:
    launch(Path(__file__).with_name("team.py"), str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["gathered"] == second["gathered"] == [{"0": [0]}, {"1": [1]}]
    assert first["shared"] == second["shared"] == "of rank 0"
    assert first["fault"] == "the disk is full" and "Rank 0 failed" in second["fault"] and "disk is full" in second["fault"]
    assert first["goes on"] and second["goes on"]
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [{"row": row, "text": f"{row}\u2028{row % 2}"} for row in range(5)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.json", "1.json", "rows.jsonl"]


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_rank_copies_and_hashes_weights(is_first: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    for name in ("whole_weights", "state_hash"):
        real = getattr(boundary, name)
        monkeypatch.setattr(
            boundary, name, lambda given, name=name, real=real, **options: calls.append(name) or real(given, **options)
        )
    told: list[Any] = []
    monkeypatch.setattr(boundary, "of_first_rank", lambda value: told.append(value) or value or "told by rank 0")
    trainer: Any = SimpleNamespace(is_global_zero=is_first)
    model = tiny_palm()
    opponent = SimpleNamespace(moving=SimpleNamespace(average=model))
    module = SimpleNamespace(policy=model, opponent=opponent, base_hash="b" * 64, init_from=None, lora=None)
    made = boundary.Boundary(trainer, module, tmp_path, run="run")
    if is_first:
        assert calls == ["whole_weights", "whole_weights", "state_hash"] and made.digest[32:] == "b" * 32
    else:
        assert not calls and not made.weights and not made.average and made.digest == "told by rank 0"
