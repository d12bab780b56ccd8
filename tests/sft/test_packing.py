"""Packed fine-tuning equals fine-tuning on padded rows: losses, gradients, metrics. Every row is seen once and runs resume."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_align.data.mixture import SourcePart
from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.sft.module import SFTModule
from tests.data.helpers import write_jsonl
from tests.toys import tiny_palm
from tests.training.runs import trainer

# Responses of 1 to 40 characters.
ROWS = [{"prompt": "p" * (1 + i % 5), "response": chr(97 + i % 26) * (1 + i * i % 40)} for i in range(37)]


def data(folder: Path, **options: Any) -> SFTDataModule:
    rows = write_jsonl(folder / "rows.jsonl", ROWS)
    settings = {"train": rows, "validation": rows, "max_length": 64, "cache_dir": str(folder / "cache")}
    return SFTDataModule(**{**settings, **options})


class Seen(Callback):
    """Keeps the rows of each step and the gradient of the last one."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.gradient: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch["rows"].tolist())

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        found = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
        self.gradient = found or self.gradient


def module() -> SFTModule:
    return SFTModule(tiny_palm(num_tokens=259, dtype=torch.float64), optimizer=partial(torch.optim.SGD, lr=0.0))


def fit(folder: Path, *, accumulate: int, **options: Any) -> tuple[Seen, dict[str, float]]:
    """Train one optimizer step on all rows. Returns what was seen and the validation metrics."""
    seen = Seen()
    run = trainer(folder, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[seen], precision="64-true")
    run.fit(module(), datamodule=data(folder, **options))
    return seen, {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_gradient_of_an_epoch_and_the_metrics_equal_those_of_padded_rows(tmp_path: Path, batch_size: int) -> None:
    packed, metrics = fit(tmp_path, accumulate=100, packing=True, batch_size=batch_size)
    padded, expected = fit(tmp_path, accumulate=100, batch_size=5)
    assert sorted(chain(*packed.rows)) == sorted(chain(*padded.rows)) == list(range(len(ROWS)))
    # The mean over tokens divides by a float32 count.
    for ours, theirs in zip(packed.gradient, padded.gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert {"val/loss", "val/bits_per_byte"} <= metrics.keys()


def test_a_stopped_run_resumes_on_the_right_batch(tmp_path: Path) -> None:
    options = {"packing": True, "batch_size": 2, "packed_length": 70}

    def run(stop: int, **given: Any) -> list[list[int]]:
        seen = Seen()
        keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        arguments = {"max_epochs": -1, "max_steps": stop, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer(tmp_path, callbacks=[seen, keep], **arguments).fit(module(), datamodule=data(tmp_path, **options), **given)
        return seen.rows

    whole = run(16)
    for stop in (3, 6, 9):
        assert run(16, ckpt_path=tmp_path / "kept" / f"step={stop}.ckpt") == whole[stop:]


def test_every_epoch_has_every_row_once_and_another_order(tmp_path: Path) -> None:
    seen = Seen()
    trainer(tmp_path, max_epochs=3, callbacks=[seen]).fit(module(), datamodule=data(tmp_path, packing=True, batch_size=2))
    steps = len(seen.rows) // 3
    epochs = [list(chain(*seen.rows[i * steps : (i + 1) * steps])) for i in range(3)]
    assert all(sorted(epoch) == list(range(len(ROWS))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_overfitting_takes_packed_batches(tmp_path: Path) -> None:
    seen = Seen()
    run = trainer(tmp_path, max_epochs=2, overfit_batches=1, callbacks=[seen])
    run.fit(module(), datamodule=data(tmp_path, packing=True, batch_size=2))
    assert seen.rows[0] == seen.rows[1]
    assert len(seen.rows[0]) > 2


def test_prediction_is_not_packed(tmp_path: Path) -> None:
    module_data = data(tmp_path, packing=True, predict=write_jsonl(tmp_path / "p.jsonl", ROWS[:3]))
    module_data.prepare_data()
    module_data.setup("predict")
    assert [batch["rows"].tolist() for batch in module_data.predict_dataloader()] == [[0, 1, 2]]


@pytest.mark.parametrize("stage", ["train", "validation"])
def test_rows_of_text_are_refused(tmp_path: Path, stage: str) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "some text"}])
    with pytest.raises(ValueError, match=rf"`packing` must be false for rows of text, but got true, and .*\(`{stage}`\)"):
        data(tmp_path, packing=True, **{stage: texts}).prepare_data()


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`packed_length` must be at least `max_length` \(64\), but got 63"):
        data(tmp_path, packing=True, packed_length=63)
    with pytest.raises(ValueError, match="`packed_length` must be None without packing, but got 128"):
        data(tmp_path, packed_length=128)
    parts = [SourcePart(write_jsonl(tmp_path / f"{i}.jsonl", ROWS), weight=i + 1.0) for i in range(2)]
    with pytest.raises(ValueError, match="`packing` must be false for a mixture with weights"):
        data(tmp_path, packing=True, train=parts)


def test_a_mixture_without_weights_is_packed(tmp_path: Path) -> None:
    parts = [SourcePart(write_jsonl(tmp_path / f"{i}.jsonl", ROWS[: 10 + i])) for i in range(2)]
    seen = Seen()
    module_data = data(tmp_path, packing=True, train=parts, batch_size=2)
    trainer(tmp_path, callbacks=[seen], limit_val_batches=0).fit(module(), datamodule=module_data)
    assert sorted(chain(*seen.rows)) == list(range(21))


def test_the_command_line_sets_packing() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SFTDataModule, "data")
    words = ["--data", "SFTDataModule", "--data.init_args.packing", "true", "--data.init_args.packed_length", "1024"]
    made = parser.instantiate_classes(parser.parse_args(words)).data
    assert (made.packing, made.packed_length, made.max_length) == (True, 1024, 512)
