"""Every private or undocumented part of Lightning that the package uses, in one place.

A new release of Lightning may rename or change any of these without notice. ``INTERNALS`` lists them with the reason for each
use. A test checks that each of them exists in the installed release, and that no other file of the package uses one.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner.lr_finder import _LRCallback

CHECKED_ON = "2.6.6"
"""The release of Lightning that every entry of ``INTERNALS`` was checked on."""


class Internal(NamedTuple):
    """One private or undocumented part of Lightning."""

    path: str
    """Where it is: a module, then attributes. ``Trainer()`` stands for an attribute of an instance."""
    why: str


INTERNALS = (
    Internal(
        "lightning.pytorch.core.mixins.hparams_mixin._given_hyperparameters",
        "tells whether a module is built from a parsed configuration, which holds primitives only",
    ),
    Internal("lightning.pytorch.LightningModule()._trainer", "the Trainer or None; `trainer` raises where there is none"),
    Internal("lightning.pytorch.Trainer().callbacks", "the list of callbacks, to find one and to add one"),
    Internal("lightning.pytorch.Trainer().log_every_n_steps", "set by the logger connector, without a type"),
    Internal("lightning.pytorch.Trainer().fast_dev_run", "set by a function outside of the class, without a type"),
    Internal("lightning.pytorch.Trainer().overfit_batches", "set by a function outside of the class, without a type"),
    Internal(
        "lightning.pytorch.Trainer().reload_dataloaders_every_n_epochs",
        "self-play changes its rows before an epoch, and a refreshed database its neighbors",
    ),
    Internal(
        "lightning.pytorch.Trainer().fit_loop.epoch_progress",
        "a run resumed at the end of an epoch does not count the next epoch as begun",
    ),
    Internal("lightning.pytorch.Trainer().fit_loop._data_source", "makes loaders for a pass over all rows before training"),
    Internal("lightning.pytorch.Trainer().fit_loop.epoch_loop.val_loop._data_source", "as above, for validation rows"),
    Internal("lightning.pytorch.Trainer().fit_loop.max_epochs", "self-play ends after its last iteration"),
    Internal(
        "lightning.pytorch.Trainer().fit_loop.epoch_loop.batch_progress",
        "a run resumed at the end of an epoch would skip batches of an epoch of another length",
    ),
    Internal("lightning.pytorch.Trainer().fit_loop.epoch_loop.restarted_on_train_batch_end", "as above"),
    Internal("lightning.pytorch.Trainer().fit_loop.epoch_loop._batches_that_stepped", "the place of a checkpoint holds it"),
    Internal("lightning.pytorch.Trainer().fit_loop.epoch_loop.scheduler_progress", "tells whether a step is complete"),
    Internal("lightning.pytorch.Trainer().fit_loop.epoch_loop.automatic_optimization.optim_progress", "as above"),
    Internal(
        "lightning.pytorch.Trainer().fit_loop.epoch_loop._should_check_val_fx",
        "a checkpoint says whether the validation after its batch is still to come",
    ),
    Internal("lightning.pytorch.Trainer()._val_check_time_interval", "validations by the clock are not tied to a batch"),
    Internal("lightning.pytorch.Trainer().fit_loop._data_fetcher", "an argument of `_should_check_val_fx`"),
    Internal("lightning.pytorch.Trainer().fit_loop._restarting", "a resumed run that validates updates plateau schedules"),
    Internal(
        "lightning.pytorch.Trainer().fit_loop._should_accumulate",
        "a sharded policy reduces its gradients after the last micro-batch only; Lightning blocks the reduction of DDP alone",
    ),
    Internal("lightning.pytorch.Trainer().fit_loop.epoch_loop.restarting", "a run resumed between epochs begins an epoch"),
    Internal("lightning.pytorch.LightningModule()._current_fx_name", "the hook that runs while a checkpoint is taken"),
    Internal(
        "lightning.pytorch.Trainer()._accelerator_connector.cluster_environment",
        "the signal with which SLURM announces that it requeues the job",
    ),
    Internal("lightning.pytorch.tuner.lr_finder._LRCallback", "tells whether `Tuner.lr_find` runs"),
    Internal(
        "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher",
        "the processes that rank 0 has launched, to say how one ended and to end them",
    ),
    Internal("lightning.pytorch.Trainer().lr_scheduler_configs", "self-play restarts the schedule with each iteration"),
    Internal(
        "lightning.pytorch.callbacks.ModelCheckpoint()._last_global_step_saved",
        "the end of a run is saved only if it is not saved yet",
    ),
    Internal(
        "lightning.pytorch.callbacks.ModelCheckpoint()._last_checkpoint_saved",
        "`save_last: link` links to it, and self-play saves a checkpoint of its own between iterations",
    ),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint._link_checkpoint", "as above"),
    Internal(
        "lightning.pytorch.loggers.TensorBoardLogger.experiment",
        "its SummaryWriter's `_get_file_writer` takes the summaries of the HPARAMS tab without a point in a curve",
    ),
    Internal("lightning.pytorch.cli.LightningCLI._add_subcommands", "overridden to describe the commands in one line each"),
    Internal(
        "lightning.pytorch.cli.LightningCLI._prepare_subcommand_parser", "overridden to add `--output` and to set defaults"
    ),
    Internal(
        "lightning.pytorch.cli.LightningCLI._parse_ckpt_path", "overridden so that the command line wins over the checkpoint"
    ),
    Internal(
        "lightning.pytorch.cli.LightningArgumentParser()._subcommands_action",
        "jsonargparse keeps the list of commands there",
    ),
)


def built_from_config() -> bool:
    """Return whether a module is being built by ``LightningCLI``, which records the parsed configuration itself."""
    return _given_hyperparameters.get() is not None


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """Return the Trainer that a module is attached to, or None."""
    untyped: Any = module
    trainer: L.Trainer | None = untyped._trainer
    return trainer


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """Return the Trainer's list of callbacks; a change to the list is a change to the Trainer."""
    untyped: Any = trainer
    callbacks: list[Callback] = untyped.callbacks
    return callbacks


def searches_rate(trainer: L.Trainer) -> bool:
    """Return whether the run is that of `Tuner.lr_find`."""
    return any(isinstance(callback, _LRCallback) for callback in callbacks_of(trainer))


def datamodule_of(trainer: L.Trainer | None) -> Any:
    """Return the data module of the running command, or None."""
    return getattr(trainer, "datamodule", None)


def ranks_of(trainer: L.Trainer) -> int:
    """Return the number of ranks, also before there is a process group."""
    return max(trainer.world_size, trainer.num_devices * trainer.num_nodes)


def launched_processes(trainer: L.Trainer) -> dict[int, Any]:
    """Return the processes that this one has launched, by rank."""
    launcher: Any = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return {}
    return {trainer.global_rank + number: process for number, process in enumerate(launcher.procs, start=1)}


def log_interval(trainer: L.Trainer) -> int:
    """Return ``log_every_n_steps``; 0 means that nothing is logged."""
    untyped: Any = trainer
    return int(untyped.log_every_n_steps)


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Return whether the run is a ``fast_dev_run``, which writes no files."""
    untyped: Any = trainer
    return bool(untyped.fast_dev_run)


def overfits(trainer: L.Trainer | None) -> bool:
    """Return whether the run trains on the same few batches (``overfit_batches``)."""
    untyped: Any = trainer
    return trainer is not None and untyped.overfit_batches > 0


def reload_interval(trainer: L.Trainer) -> int:
    """Return ``reload_dataloaders_every_n_epochs``; 0 means never."""
    untyped: Any = trainer
    return int(untyped.reload_dataloaders_every_n_epochs)


def set_reload_interval(trainer: L.Trainer, epochs: int) -> None:
    """Make the Trainer ask for new data loaders every so many epochs."""
    untyped: Any = trainer
    untyped.reload_dataloaders_every_n_epochs = epochs


def limit_epochs(trainer: L.Trainer, epochs: int) -> None:
    """Lower ``max_epochs`` to a number of epochs."""
    most = trainer.fit_loop.max_epochs
    if most is None or most < 0 or most > epochs:
        trainer.fit_loop.max_epochs = epochs


def count_epoch_as_begun(trainer: L.Trainer) -> None:
    """Count the current epoch as begun.

    A run that is resumed from the last batch of an epoch does not count the next epoch as begun. A run that is resumed from
    the last batch of that epoch would then train it a second time.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    for epochs in (progress.total, progress.current):
        epochs.ready = epochs.started = epochs.processed + 1


def skip_no_batches(trainer: L.Trainer, *, enough: int) -> None:
    """Start the epoch at its first batch, although the run was resumed from the last batch of an epoch of another length.

    Lightning compares the number of completed batches of that epoch with the length of the new one, and would skip as many of
    the new batches.

    Args:
        trainer: The Trainer, at the start of an epoch.
        enough: A number of batches that no epoch reaches.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
        loop.batch_progress.current.completed = enough


# -- the place of a checkpoint


def accumulates(trainer: L.Trainer) -> bool:
    """Return whether the optimizer takes no step after the current micro-batch."""
    untyped: Any = trainer.fit_loop
    return bool(untyped._should_accumulate())


def batch_counts(trainer: L.Trainer) -> tuple[int, int]:
    """Return the micro-batches that the run has begun, and the steps that its loggers count."""
    loop: Any = trainer.fit_loop.epoch_loop
    return int(loop.batch_progress.total.ready), int(loop._batches_that_stepped)


def batches_in_epoch(trainer: L.Trainer) -> int:
    """Return the micro-batches of the current epoch that are completed."""
    loop: Any = trainer.fit_loop.epoch_loop
    return int(loop.batch_progress.current.completed)


def epochs_processed(trainer: L.Trainer) -> int:
    """Return the epochs whose batches are over. It is greater than `current_epoch` in the hooks at the end of an epoch."""
    progress: Any = trainer.fit_loop.epoch_progress
    return int(progress.current.processed)


def running_hook(trainer: L.Trainer) -> str | None:
    """Return the name of the hook that is running."""
    untyped: Any = trainer.lightning_module
    name: str | None = untyped._current_fx_name
    return name


def inside_update(trainer: L.Trainer) -> bool:
    """Return whether the optimizer or its schedule is taking a step, given that the gradient is complete."""
    loop: Any = trainer.fit_loop.epoch_loop
    step, batch = loop.automatic_optimization.optim_progress.optimizer.step.total, loop.batch_progress.current
    schedule = loop.scheduler_progress.total
    return bool(step.ready != step.completed or batch.processed != batch.ready or schedule.ready != schedule.completed)


def validation_pending(trainer: L.Trainer) -> bool:
    """Return whether the validation after the current batch is due and has not ended."""
    loop: Any = trainer.fit_loop.epoch_loop
    batch, untyped = loop.batch_progress.current, cast(Any, trainer)
    if trainer.state.fn != TrainerFn.FITTING or untyped._val_check_time_interval is not None:
        return False
    if trainer.validating:
        return running_hook(trainer) != "on_validation_end"
    if batch.completed >= batch.ready or trainer.fit_loop._data_fetcher is None:
        return False  # it ran before the batch was counted as completed
    # A run that is told to stop validates before it ends. The resumed run goes on.
    stops, trainer.should_stop = trainer.should_stop, False
    try:
        return bool(loop._should_check_val_fx(trainer.fit_loop._data_fetcher))
    finally:
        trainer.should_stop = stops


def begin_resumed(trainer: L.Trainer, *, due: bool) -> None:
    """Correct the loops of a run at its start, after Lightning restored them.

    Args:
        trainer: The Trainer, at the start of the training.
        due: Whether the run resumes at a validation that is due.
    """
    loop: Any = trainer.fit_loop
    if loop.epoch_progress.current.ready == loop.epoch_progress.current.processed:
        # Between epochs. With `max_steps`, Lightning would go on in the epoch that is over.
        loop.epoch_loop.restarting = False
    if due:
        loop._restarting = False  # otherwise a schedule that monitors this validation would not see it
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            # It does this at the start of an epoch, where a resumed run was not.
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)


def requeue_signal(trainer: L.Trainer) -> int | None:
    """Return the signal at which Lightning saves a checkpoint and has SLURM requeue the job, or None."""
    untyped: Any = trainer
    environment = untyped._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return None if environment.requeue_signal is None else int(environment.requeue_signal)


def new_loaders(trainer: L.Trainer) -> list[Iterable[Any]]:
    """Make the training loaders, and the validation loaders if the run validates, apart from the Trainer's own."""
    loops: Any = trainer.fit_loop
    sources = [loops._data_source]
    if trainer.enable_validation:
        sources.append(loops.epoch_loop.val_loop._data_source)
    return [source.dataloader() for source in sources]


def replace_schedule(trainer: L.Trainer, number: int, scheduler: Callable[[], Any]) -> None:
    """Put a new scheduler in the place of one that the Trainer steps, if there is one of that number."""
    if number < len(trainer.lr_scheduler_configs):
        trainer.lr_scheduler_configs[number].scheduler = scheduler()


def last_saved_step(callback: ModelCheckpoint) -> int:
    """Return the optimizer step of the last checkpoint that a callback saved."""
    return callback._last_global_step_saved


def link_last(trainer: L.Trainer, callback: ModelCheckpoint, path: str) -> None:
    """Link the `last.ckpt` of a callback to a checkpoint that it did not save."""
    callback._last_checkpoint_saved = path
    callback._link_checkpoint(trainer, path, callback.last_model_path)


def add_summary(logger: TensorBoardLogger, summary: Any) -> None:
    """Write a TensorBoard summary as it is. ``log_hyperparams`` would add the initial metrics as points of their curves."""
    logger.experiment._get_file_writer().add_summary(summary)


def subcommand_actions(parser: LightningArgumentParser) -> list[Any]:
    """Return the entries of a parser's list of commands, with ``dest`` and ``help``."""
    untyped: Any = parser
    actions: list[Any] = untyped._subcommands_action._choices_actions
    return actions
