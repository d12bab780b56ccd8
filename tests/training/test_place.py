"""A checkpoint that is taken at any moment resumes at the end of the last optimizer step, on the same rows, bit for bit."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, OnExceptionCheckpoint, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from lightning_align.sft.module import SFTModule
from lightning_align.training.place import KEY, Clock
from tests.training.places import METHODS, Run, SaveAt, assert_goes_on, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),  # the Timer is not needed again
    # With an OnExceptionCheckpoint, Lightning looks for its file before every fit.
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint"),
]

EARLIER: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 6}
"""Validations after micro-batches 6 and, in the second epoch, 6 again. Steps of 3, 3, 3 and 2 micro-batches."""


class Stop(Callback):
    """Stops the run, raises, or does what a function does, in a hook's call of a number from 0."""

    def __init__(self, hook: str, call: int, act: Callable[[L.Trainer], None]) -> None:
        self.call, self.act, self.seen = call, act, 0
        setattr(self, hook, self._count)

    def _count(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.seen += 1
        if self.seen == self.call + 1:
            self.act(trainer)


def fail(trainer: L.Trainer) -> None:
    raise RuntimeError("planted")


def stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_any_moment_resumes_exactly(method: str, tmp_path: Path) -> None:
    """One run saves inside and between steps, in a validation, at the ends of epochs, and after the fit."""
    windowed = EARLIER if method != "retro" else {"accumulate_grad_batches": 3, "val_check_interval": 2}
    moments = [
        ("on_train_start", 0),
        ("on_train_batch_start", 4),  # in the second window
        ("on_before_backward", 1),
        ("on_before_optimizer_step", 1),
        ("on_train_batch_end", 4),  # a part of a window is done
        ("on_train_batch_end", 5),  # a validation is due
        ("on_validation_batch_end", 0),
        ("on_validation_end", 0),
        ("on_train_epoch_end", 0),
        ("on_train_epoch_start", 1),
        ("on_after_backward", 11),  # the first window of the second epoch
    ]
    whole = Run(method, tmp_path / "whole", **windowed)
    save = SaveAt(tmp_path, moments)
    saving = Run(method, tmp_path / "run", save, **windowed)
    assert_goes_on(whole, saving, since=0)
    chosen = moments if method == "sft" else [moments[i] for i in (1, 4, 6, 10)]
    assert set(chosen) <= set(save.steps)
    for moment in chosen:
        resumed = Run(method, tmp_path / "run", ckpt_path=save.paths[moment], **windowed)
        assert_goes_on(whole, resumed, since=save.steps[moment])


@pytest.mark.parametrize(
    "case",
    ["in an epoch", "at its end", "accumulating", "workers", "told to stop", "out of time", "no validation"],
)
def test_a_checkpoint_saved_after_a_fit_resumes_in_its_epoch(case: str, tmp_path: Path) -> None:
    steps = {"at its end": 11, "accumulating": 2}.get(case, 3)
    options: dict[str, Any] = {"max_epochs": -1, "accumulate_grad_batches": 3 if case == "accumulating" else 1}
    data = {"num_workers": 2} if case == "workers" else None
    if case == "no validation":
        options["limit_val_batches"] = 0
    ends: list[Callback] = []
    until = {"max_steps": steps}
    if case == "told to stop":
        ends, until = [Stop("on_train_batch_end", 2, stop)], {}
    if case == "out of time":
        ends, until = [timer := Timer(duration={"hours": 1})], {}
        ends.append(Stop("on_train_batch_start", 2, lambda _: setattr(timer, "_duration", 0.0)))
    whole = Run("sft", tmp_path, max_steps=15, data=data, **options)
    first = Run("sft", tmp_path, *ends, data=data, **options, **until)
    assert first.trainer.global_step == steps
    path = first.save(tmp_path / "after.ckpt")
    resumed = Run("sft", tmp_path, ckpt_path=path, max_steps=15, data=data, **options)
    assert_goes_on(whole, resumed, since=steps)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("sft", "retro")])
def test_it_does_so_for_each_method(method: str, tmp_path: Path) -> None:
    whole = Run(method, tmp_path / "whole", max_steps=15)
    path = Run(method, tmp_path / "run", max_steps=4).save(tmp_path / "after.ckpt")
    assert_goes_on(whole, Run(method, tmp_path / "run", ckpt_path=path, max_steps=15), since=4)


def test_after_a_second_fit_the_place_is_that_of_the_second(tmp_path: Path) -> None:
    """Lightning starts the second fit of a Trainer with the next epoch."""

    def twice(steps: int) -> Run:
        run = Run("sft", tmp_path, max_epochs=-1, max_steps=3)
        run.trainer.fit_loop.epoch_loop.max_steps = steps
        run.trainer.fit(run.module, run.data)
        return run

    whole, first = twice(9), twice(6)
    path = first.save(tmp_path / "after.ckpt")
    first.trainer.validate(first.module, first.data, verbose=False)
    later = torch.load(first.save(tmp_path / "later.ckpt"), weights_only=True)
    assert later[KEY] == torch.load(path, weights_only=True)[KEY]  # a validation afterwards does not move it
    assert (later[KEY]["epoch"], later[KEY]["batches"], later[KEY]["total"]) == (1, 3, 6)
    assert_goes_on(whole, Run("sft", tmp_path, ckpt_path=path, max_epochs=-1, max_steps=9), since=6)


@pytest.mark.parametrize("hook, call", [("on_train_batch_start", 4), ("on_after_backward", 4), ("on_validation_batch_end", 0)])
def test_a_checkpoint_on_an_exception_resumes_exactly(hook: str, call: int, tmp_path: Path) -> None:
    whole = Run("sft", tmp_path, **EARLIER)

    class Keep(OnExceptionCheckpoint):
        def teardown(self, *_: Any, **__: Any) -> None:
            """Keep the file."""

    failed = Run("sft", tmp_path, Keep(tmp_path), Stop(hook, call, fail), **EARLIER)
    assert str(failed.error) == "planted"
    resumed = Run("sft", tmp_path, ckpt_path=tmp_path / "on_exception.ckpt", **EARLIER)
    assert_goes_on(whole, resumed, since=failed.trainer.global_step)


def test_a_checkpoint_within_an_optimizer_step_is_refused(tmp_path: Path) -> None:
    """Of some weights before the step and others after it, no run can be made. As the start of a new run it can be used."""

    class Halfway(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            def save(*_: Any) -> None:
                if trainer.global_step == 2:
                    with pytest.warns(UserWarning, match="in the middle of an optimizer step"):
                        trainer.save_checkpoint(tmp_path / "torn.ckpt")

            trainer.optimizers[0].register_step_post_hook(save)

    Run("sft", tmp_path, Halfway())
    with pytest.raises(ValueError, match=r"torn\.ckpt was saved in the middle of an optimizer step.*earlier checkpoint"):
        Run("sft", tmp_path, ckpt_path=tmp_path / "torn.ckpt")
    assert SFTModule(init_from=str(tmp_path / "torn.ckpt")).source is not None


@pytest.mark.parametrize("moment", [("on_after_backward", 4), ("on_before_backward", 1), ("on_train_epoch_end", 0), None])
def test_a_checkpoint_of_an_earlier_release_gets_its_place(
    moment: tuple[str, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those have no place. It is found where it can be: in the middle of a step, and after a fit that ended by steps."""
    options = {"max_steps": 7, "max_epochs": -1, "accumulate_grad_batches": 3, "limit_val_batches": 0}
    whole = Run("sft", tmp_path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Clock, "save", lambda *_: None)
        save = SaveAt(tmp_path, [moment] if moment else [])
        first = Run("sft", tmp_path, save, **{**options, "max_steps": 7 if moment else 2})
        path = save.paths[moment] if moment else first.save(tmp_path / "after.ckpt")
    assert KEY not in torch.load(path, weights_only=True)
    since = save.steps[moment] if moment else 2
    assert_goes_on(whole, Run("sft", tmp_path, ckpt_path=path, **options), since=since)


@pytest.mark.parametrize("call", [3, 12, 16])
def test_a_resumed_epoch_accumulates_as_the_schedule_says(call: int, tmp_path: Path) -> None:
    def schedule() -> GradientAccumulationScheduler:
        return GradientAccumulationScheduler({0: 1, 1: 3})

    save = SaveAt(tmp_path, [("on_train_batch_end", call)])
    whole = Run("sft", tmp_path, save, schedule(), max_epochs=3)
    resumed = Run("sft", tmp_path, schedule(), ckpt_path=save.paths["on_train_batch_end", call], max_epochs=3)
    assert_goes_on(whole, resumed, since=save.steps["on_train_batch_end", call])


@pytest.mark.parametrize("case", ["sft", "retro", "workers"])
def test_overfitting_goes_on_with_the_next_of_its_batches(case: str, tmp_path: Path) -> None:
    method = "retro" if case == "retro" else "sft"
    options: dict[str, Any] = {"overfit_batches": 3, "accumulate_grad_batches": 2, "max_epochs": 3}
    data = {"num_workers": 1} if case == "workers" else None
    save = SaveAt(tmp_path, [("on_train_batch_end", 4), ("on_train_batch_end", 5), ("on_validation_end", 0)])
    whole = Run(method, tmp_path, save, data=data, **options)
    assert len({str(rows) for steps in whole.record.steps.values() for rows in steps}) == 3
    for moment, path in save.paths.items():
        resumed = Run(method, tmp_path, data=data, ckpt_path=path, **options)
        assert_goes_on(whole, resumed, since=save.steps[moment])


@pytest.mark.filterwarnings("ignore:You requested to overfit")  # the other loader shuffles
@pytest.mark.filterwarnings("ignore:`.*` returned `None`")  # it trains nothing
def test_overfitting_beside_a_loader_that_the_trainer_changes(tmp_path: Path) -> None:
    """It then puts plain samplers in the place of all."""
    _, data, _ = build("sft", tmp_path)
    seen: list[list[int]] = []

    class Both(L.LightningModule):
        def train_dataloader(self) -> Any:
            data.trainer = self.trainer
            data.prepare_data()
            data.setup("fit")
            return {"rows": data.train_dataloader(), "other": DataLoader([1, 2, 3], shuffle=True)}  # type: ignore[arg-type]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch["rows"]["rows"].tolist())

        def configure_optimizers(self) -> None:
            """Train nothing."""

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", overfit_batches=2, max_epochs=2, default_root_dir=tmp_path, **quiet).fit(Both())
    assert len(seen) == 4 and seen[:2] == seen[2:]


@pytest.mark.parametrize("place", ["forward", "inside the optimizer step"])
def test_a_requeued_job_goes_on_where_it_was(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's signal is answered at once in a forward pass, and at the end of the batch inside an optimizer step."""
    for name in ("JOB_ID", "NTASKS", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "1" if name in ("JOB_ID", "NTASKS") else "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda _: 0)  # scontrol
    saved: list[bool] = []

    def announce(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        saved.append((tmp_path / "hpc_ckpt_1.ckpt").exists())

    class Preempt(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if place != "forward":
                hook = trainer.optimizers[0].register_step_post_hook(lambda *_: (announce(), hook.remove()))

    preempt = Stop("on_before_backward", 4, announce) if place == "forward" else Preempt()
    whole = Run("sft", tmp_path, preempt, plugins=[SLURMEnvironment(auto_requeue=True)], **EARLIER)
    assert saved == [place == "forward"]
    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert not checkpoint[KEY]["torn"] and checkpoint["global_step"] == 1
    # Lightning finds the file by itself.
    resumed = Run("sft", tmp_path, plugins=[SLURMEnvironment(auto_requeue=True)], **EARLIER)
    assert_goes_on(whole, resumed, since=1)
