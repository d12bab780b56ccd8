"""`batch_tokens` of the data modules: the budget holds, and a step has the mean gradient over all of its rows."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_align.data.mixture import SourcePart
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.sft.datamodule import SFTDataModule
from tests.data.helpers import write_jsonl
from tests.toys import largest_difference, tiny_palm

ROWS = [{"prompt": "p" * (3 + i % 5), "chosen": "c" * (1 + i % 7), "rejected": "r" * (1 + i * i % 11)} for i in range(23)]


class Seen(L.Callback):
    """Keeps the rows and tokens of each batch."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch["chosen"]["rows"].tolist())
        self.tokens.append(sum(int(batch[side]["mask"].sum()) for side in ("chosen", "rejected")))


def trained(tmp_path: Path, seen: Seen, *, accumulated: int = 1, **data: Any) -> dict[str, Tensor]:
    source = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    module = DPOModule(tiny_palm(num_tokens=259), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulated,
        callbacks=[seen],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(module, DPODataModule(source, max_length=32, cache_dir=str(tmp_path / "cache"), **data))
    return {name: value.detach() for name, value in module.policy.state_dict().items()}


def test_a_step_over_batches_of_tokens_is_the_step_of_all_rows(tmp_path: Path) -> None:
    budgeted, whole = Seen(), Seen()
    ends = trained(tmp_path, budgeted, accumulated=1000, batch_tokens=100)
    expected = trained(tmp_path, whole, batch_size=len(ROWS))
    assert len(budgeted.rows) > 3 and len({len(rows) for rows in budgeted.rows}) > 1 and len(whole.rows) == 1
    assert sorted(row for rows in budgeted.rows for row in rows) == list(range(len(ROWS)))
    assert max(budgeted.tokens) <= 100
    assert largest_difference(ends, expected) <= 1e-5


def test_what_does_not_go_with_a_budget_is_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(ValueError, match="`batch_tokens` must be null with `packing`, but got 64"):
        SFTDataModule(source, packing=True, batch_tokens=64)
    parts = [SourcePart(source=source, weight=1.0), SourcePart(source=source, weight=2.0)]
    data = DPODataModule(parts, max_length=32, batch_tokens=64, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(ValueError, match="`batch_tokens` is 64, but weights of sources need `batch_size`"):
        data.train_dataloader()
    small = DPODataModule(source, max_length=32, batch_tokens=20, cache_dir=str(tmp_path / "cache"))
    small.prepare_data()
    small.setup("fit")
    with pytest.raises(ValueError, match="`batch_tokens` must be at least the tokens of the longest row"):
        small.train_dataloader()
