"""Runs with Lightning's averages of weights and with data loaders of other packages resume exactly from any moment."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities import CombinedLoader

from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.sft.module import SFTModule
from tests.toys import tiny_palm, token_batch
from tests.training import places
from tests.training.places import MODULE, Record, Run, SaveAt, assert_goes_on, rows_of, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]
Moment = tuple[str, int]


@pytest.mark.parametrize(
    "moment",
    [
        ("on_validation_batch_end", 0),  # the average is in the place of the weights
        ("on_validation_epoch_end", 0),
        ("on_train_batch_end", 2),  # by a callback that comes before the one that averages
    ],
)
def test_an_average_of_the_weights_is_not_taken_for_the_weights(moment: Moment, tmp_path: Path) -> None:
    def average() -> Callback:
        return EMAWeightAveraging(decay=0.5)

    save = SaveAt(tmp_path, [moment])
    whole = Run("sft", tmp_path, save, average(), val_check_interval=5, max_epochs=1)
    resumed = Run("sft", tmp_path, average(), ckpt_path=save.paths[moment], val_check_interval=5, max_epochs=1)
    assert_goes_on(whole, resumed, since=save.steps[moment])


@pytest.mark.parametrize("call", [4, 12])
def test_stochastic_weight_averaging_goes_on_in_the_middle_of_an_epoch(call: int, tmp_path: Path) -> None:
    def average() -> Callback:
        return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)

    moment = ("on_train_batch_end", call)
    save = SaveAt(tmp_path, [moment])
    whole = Run("sft", tmp_path, save, average(), max_epochs=3)
    assert_goes_on(whole, Run("sft", tmp_path, average(), ckpt_path=save.paths[moment], max_epochs=3), since=save.steps[moment])


class Plateaus(SFTModule):
    """A module of somebody else, whose schedules monitor metrics besides one that counts steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-2)
        schedules = torch.optim.lr_scheduler
        each_epoch = {"scheduler": schedules.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=9.0)}
        each_step = {"scheduler": schedules.ReduceLROnPlateau(optimizer, factor=0.9, patience=0, threshold=9.0)}
        return [optimizer], [
            {"scheduler": schedules.LinearLR(optimizer, 0.1, 1.0, 10), "interval": "step"},
            {**each_epoch, "monitor": "val/loss", "interval": "epoch"},
            {**each_step, "monitor": "train/loss", "interval": "step", "frequency": 3},
        ]


@pytest.mark.parametrize("moment", [("on_after_backward", 4), ("on_train_batch_end", 5), ("on_train_epoch_end", 0)])
def test_schedules_that_monitor_a_metric_go_on(moment: Moment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SFTModule", Plateaus)
    save = SaveAt(tmp_path, [moment])
    options = {"accumulate_grad_batches": 3}
    whole = Run("sft", tmp_path, save, **options)
    resumed = Run("sft", tmp_path, ckpt_path=save.paths[moment], **options)
    rates = [[group["lr"] for group in run.trainer.optimizers[0].param_groups] for run in (whole, resumed)]
    assert rates[0] == rates[1] and rates[0][0] < 0.01 * 0.7
    assert_goes_on(whole, resumed, since=save.steps[moment])


def test_a_validation_that_has_ended_does_not_run_again(tmp_path: Path) -> None:
    moment = ("on_validation_end", 0)
    save = SaveAt(tmp_path, [moment])
    whole = Run("sft", tmp_path, save, val_check_interval=4)
    resumed = Run("sft", tmp_path, ckpt_path=save.paths[moment], val_check_interval=4)
    assert_goes_on(whole, resumed, since=save.steps[moment])
    assert resumed.record.validated == whole.record.validated[1:]


def test_a_checkpoint_with_weights_only_is_refused_in_one_line(tmp_path: Path) -> None:
    run = Run("sft", tmp_path, max_epochs=1)
    run.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"weights.ckpt holds weights only, so no run can resume from it\. Give it as"):
        Run("sft", tmp_path, ckpt_path=tmp_path / "weights.ckpt")


class Stateful:
    """A loader of another package: its state counts the batches that it has handed out."""

    def __init__(self, first: int, count: int) -> None:
        self.batches = [token_batch([1 + i % 3, 2], [3 + i % 4, 2], seed=i) for i in range(first, first + count)]
        self.epoch, self.handed_out, self.restored, self.sampler = 0, 0, False, self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.restored = epoch, False

    def __iter__(self) -> Iterator[Any]:
        if not self.restored or self.handed_out == len(self.batches):
            self.handed_out = 0
        self.restored = False
        order = random.Random(self.epoch).sample(self.batches, len(self.batches))
        while self.handed_out < len(order):
            self.handed_out += 1
            yield order[self.handed_out - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.handed_out, self.restored = state["epoch"], state["handed_out"], True


class Sized(Stateful):
    def __len__(self) -> int:
        return len(self.batches)


class Alternating(SFTModule):
    """A module of somebody else, which trains on the batches of two loaders in turn."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["ab"[batch_idx % 2]], batch_idx)


class Both(Record):
    """Keeps the rows of both loaders."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.window.append([row for part in ("a", "b") for row in rows_of(batch[part])] if "a" in batch else rows_of(batch))


class Own(Run):
    """A fit on loaders that are handed to the Trainer."""

    def __init__(self, loader: Any, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> None:
        L.seed_everything(3, verbose=False)
        kind = Alternating if isinstance(loader, CombinedLoader) else SFTModule
        self.module, self.record, self.error = kind(tiny_palm(num_tokens=259, ff_dropout=0.2), **MODULE), Both(), None
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        self.trainer = L.Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            limit_val_batches=0,
            callbacks=[self.record, *callbacks],
            **{"max_epochs": 2, "accumulate_grad_batches": 3, "log_every_n_steps": 1, **quiet, **options},
        )
        self.trainer.fit(self.module, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)


def ours(folder: Path, rows: int) -> Any:
    path = folder / f"{rows}.jsonl"
    path.write_text("".join(Path(write_rows(folder / "rows.jsonl")).read_text().splitlines(keepends=True)[:rows]))
    data = SFTDataModule(str(path), batch_size=2, max_length=24, cache_dir=str(folder))
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


LOADERS: dict[str, Callable[[Path], Any]] = {
    "sized": lambda _: Sized(0, 11),
    "unsized": lambda _: Stateful(0, 11),
    "two": lambda _: CombinedLoader({"a": Sized(0, 4), "b": Sized(4, 11)}, "max_size_cycle"),
    "two of ours": lambda folder: CombinedLoader({"a": ours(folder, 8), "b": ours(folder, 22)}, "max_size_cycle"),
}


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_with_states_resume_after_the_last_step(kind: str, tmp_path: Path) -> None:
    """Lightning saves what a loader has handed out. The batches of an unfinished optimizer batch would be lost."""
    moments = [
        ("on_train_batch_start", 1),  # nothing is trained yet
        ("on_train_batch_start", 4),  # in the second window
        ("on_train_batch_end", 5),  # its step is taken, by a hook before that of the module
        ("on_after_backward", 7),
        ("on_after_backward", 12),  # the first window of the second epoch
    ]
    save = SaveAt(tmp_path, moments)
    whole = Own(LOADERS[kind](tmp_path), tmp_path, save)
    assert len(whole.record.steps) == 8
    for moment in moments if kind in ("sized", "two of ours") else moments[1:4]:
        resumed = Own(LOADERS[kind](tmp_path), tmp_path, ckpt_path=save.paths[moment])
        assert_goes_on(whole, resumed, since=save.steps[moment])
