"""Features of Lightning's Trainer, each used in a short run of each method."""

import shutil
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner

from lightning_align.models.checkpoint import read_checkpoint
from tests.training.places import METHODS, build


class Freeze(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        """Freeze the layer."""
        self.freeze(self.layer(pl_module))

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        """Train the layer."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(self.layer(pl_module), optimizer)

    @staticmethod
    def layer(pl_module: Any) -> Any:
        """Return a part of what trains."""
        pl_module.configure_model()  # the Trainer calls it later
        policy = pl_module.policy
        return policy.connections[0] if hasattr(policy, "connections") else (getattr(policy, "decoder", policy)).blocks[0]


class Fail(Callback):
    """Raises in the second step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Raise."""
        if trainer.global_step == 2:
            raise ZeroDivisionError("a failure")


class Job:
    """A run of a method that is about to start."""

    def __init__(self, method: str, folder: Path) -> None:
        shutil.rmtree(folder / "sets", ignore_errors=True)  # of another run of SPIN
        self.method, self.folder = method, folder
        self.module, self.data, self.own = build(method, folder)

    def trainer(self, *callbacks: Callback, **options: Any) -> L.Trainer:
        """Make a Trainer that runs two epochs of two batches."""
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
        limits = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "max_epochs": 2}
        callbacks = (*self.own, *callbacks)
        return L.Trainer(
            accelerator="cpu",
            default_root_dir=self.folder,
            **{**quiet, **limits, "log_every_n_steps": 1, "callbacks": list(callbacks), **options},
        )

    def fit(self, *callbacks: Callback, **options: Any) -> L.Trainer:
        """Train."""
        trainer = self.trainer(*callbacks, **options)
        trainer.fit(self.module, self.data)
        return trainer


def trained(trainer: L.Trainer, steps: int = 4) -> None:
    """Check that a run took its steps, and has finite weights."""
    assert trainer.global_step == steps, trainer.global_step
    assert all(bool(p.isfinite().all()) for p in trainer.lightning_module.parameters())


def refused(run: Callable[[], Any], remedy: str) -> None:
    """Check that a run is refused with a remedy, in one line."""
    try:
        run()
    except ValueError as error:
        assert remedy in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError("it is not refused")


def lr_find(job: Job) -> None:
    """Find a learning rate, and train with it."""
    options: dict[str, Any] = {"num_training": 4, "min_lr": 1e-6, "max_lr": 1e-3, "early_stop_threshold": None}
    tuner = Tuner(job.trainer())
    if job.method == "spin":
        refused(lambda: tuner.lr_find(job.module, job.data, **options), "Find the rate with a DPOModule")
        return
    found = tuner.lr_find(job.module, job.data, **options)
    assert found is not None and len(found.results["lr"]) >= 3


def scale_batch_size(job: Job) -> None:
    """Find a batch size, which the data module then has."""
    size = Tuner(job.trainer()).scale_batch_size(job.module, job.data, max_trials=2, steps_per_trial=1, init_val=2)
    assert size is not None and job.data.batch_size == size >= 4


def find_rate(job: Job) -> None:
    """Find a learning rate at the start of a run."""
    finder = LearningRateFinder(min_lr=1e-6, max_lr=1e-3, num_training_steps=4, early_stop_threshold=None)
    if job.method == "spin":
        refused(lambda: job.fit(finder), "Find the rate with a DPOModule")
        return
    trainer = job.fit(finder)
    trained(trainer)
    assert finder.optimal_lr is not None and len(finder.optimal_lr.results["lr"]) >= 3


def find_batch_size(job: Job) -> None:
    """Find a batch size at the start of a run, which then trains with it."""
    trained(job.fit(BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=2)))
    assert job.data.batch_size >= 4


def compiled(job: Job) -> None:
    """Train a compiled module."""
    module: Any = torch.compile(job.module, backend="eager")
    trainer = job.trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler calls what its other parts warn of
        trainer.fit(module, job.data)
    trained(trainer)


def failing(job: Job) -> None:
    """Save a checkpoint when the run fails."""
    try:
        job.fit(Fail(), OnExceptionCheckpoint(job.folder, "failed"), enable_checkpointing=True)
    except ZeroDivisionError:
        pass
    assert read_checkpoint(job.folder / "failed.ckpt")["global_step"] == 2


def backbone_finetuning(job: Job) -> None:
    """Use a callback that needs a module named `backbone`."""
    refused(lambda: job.fit(BackboneFinetuning()), "Use `lora`, or a BaseFinetuning")


def base_finetuning(job: Job) -> None:
    """Train a layer from the second epoch on."""
    job.module.make_schedule = None  # torch's schedules have the parameter groups that they began with
    trainer = job.fit(Freeze())
    trained(trainer)
    assert len(trainer.optimizers[0].param_groups) > 1


def stochastic_averaging(job: Job) -> None:
    """Average the weights of the last epochs."""
    trained(job.fit(StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)))


def loggers(job: Job) -> None:
    """Log to two loggers."""
    trained(job.fit(logger=[CSVLogger(job.folder), TensorBoardLogger(job.folder)]))
    assert list(job.folder.rglob("metrics.csv")) and list(job.folder.rglob("events.*"))


def early_stopping(job: Job) -> None:
    """Stop after an epoch without improvement."""
    trained(job.fit(EarlyStopping("val/loss", min_delta=99.0, patience=1)))


def plain(steps: int = 4, callbacks: Callable[[], list[Callback]] = list, **options: Any) -> Callable[[Job], None]:
    """Return a run with options and callbacks."""

    def run(job: Job) -> None:
        trained(job.fit(*callbacks(), **options), steps)

    return run


FEATURES: dict[str, Callable[[Job], None]] = {
    "Tuner.lr_find": lr_find,
    "Tuner.scale_batch_size": scale_batch_size,
    "LearningRateFinder": find_rate,
    "BatchSizeFinder": find_batch_size,
    "torch.compile(module)": compiled,
    "BackboneFinetuning": backbone_finetuning,
    "BaseFinetuning": base_finetuning,
    "GradientAccumulationScheduler": plain(3, lambda: [GradientAccumulationScheduler({1: 2})]),
    "StochasticWeightAveraging": stochastic_averaging,
    "WeightAveraging": plain(callbacks=lambda: [EMAWeightAveraging(decay=0.5)]),
    "EarlyStopping": early_stopping,
    "Timer": plain(callbacks=lambda: [Timer(timedelta(minutes=5))]),
    "OnExceptionCheckpoint": failing,
    "overfit_batches": plain(overfit_batches=2, limit_train_batches=1.0),
    "limit_train_batches": plain(2, limit_train_batches=1),
    "gradient_clip_val": plain(gradient_clip_val=0.5),
    "detect_anomaly": plain(detect_anomaly=True),
    "profiler": plain(profiler="simple"),
    "several loggers": loggers,
    "barebones": plain(barebones=True, log_every_n_steps=None, limit_val_batches=None, num_sanity_val_steps=None),
}


REFUSED = {("Tuner.lr_find", "spin"), ("LearningRateFinder", "spin"), *(("BackboneFinetuning", method) for method in METHODS)}
"""What cannot work and raises an error that says what to do."""


def main() -> None:
    """Print what works."""
    import sys
    import tempfile
    import time

    names = sys.argv[1:] or list(FEATURES)
    with tempfile.TemporaryDirectory() as top:
        for name in names:
            for method in METHODS:
                start = time.perf_counter()
                try:
                    with warnings.catch_warnings(record=True) as seen:
                        warnings.simplefilter("always")
                        FEATURES[name](Job(method, Path(top) / method))
                    result = "yes"
                except Exception as error:
                    result = f"{type(error).__name__}: {str(error)[:200]}"
                kinds = {str(w.message)[:80] for w in seen if w.category is UserWarning}
                print(f"{name:<30}{method:<6}{time.perf_counter() - start:5.1f}s {result} {kinds if seen else ''}", flush=True)


if __name__ == "__main__":
    main()
