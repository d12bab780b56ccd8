"""Every private or undocumented part of Lightning that the package uses, in one place.

A new release of Lightning may rename or change any of these without notice. `internals_list` names them with the reason for
each use. A test checks that each of them exists in the installed release, and that no other file of the package uses one.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, cast

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner.lr_finder import _LRCallback


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


def averages(trainer: L.Trainer) -> bool:
    """Return whether a callback averages the weights."""
    return any(isinstance(callback, WeightAveraging) for callback in callbacks_of(trainer))


def watch_swaps(trainer: L.Trainer, note: Callable[[bool | None], None]) -> None:
    """Have a function told when a callback puts the average of the weights in their place for a validation, and back.

    Args:
        trainer: The Trainer, after the setup of its callbacks.
        note: Gets None before weights and average are exchanged, and afterwards whether the average is in the weights' place.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging):
            untyped: Any = callback
            untyped._swap_models = _noted(untyped, note)
            note(False)


def _noted(callback: Any, note: Callable[[bool | None], None]) -> Callable[[L.LightningModule], None]:
    swap, swapped = type(callback)._swap_models, False

    def noted(module: L.LightningModule) -> None:
        nonlocal swapped
        note(None)
        swap(callback, module)
        swapped = not swapped
        note(swapped)

    return noted


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


def loader_states(trainer: L.Trainer) -> list[Any]:
    """Return copies of the states of the training loaders that have one."""
    loader: Any = trainer.fit_loop._combined_loader
    return [] if loader is None else deepcopy(loader._state_dicts())


def lengths_of_cycles(trainer: L.Trainer) -> list[int]:
    """Return the lengths of the training loaders that have a state, if those that end before the epoch begin again."""
    loader: Any = trainer.fit_loop._combined_loader
    if loader is None or loader._mode != "max_size_cycle" or len(loader.flattened) == 1:
        return []
    parts: list[Any] = [part for part in loader.flattened if isinstance(part, _Stateful)]
    return [len(part) for part in parts]


def fetches_ahead(trainer: L.Trainer) -> bool:
    """Return whether the loader has handed out one batch more than the training has begun, because it has no length."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return isinstance(fetcher, _PrefetchDataFetcher) and fetcher.length is None


def batches_in_epoch(trainer: L.Trainer) -> int:
    """Return the micro-batches of the current epoch that are completed."""
    loop: Any = trainer.fit_loop.epoch_loop
    return int(loop.batch_progress.current.completed)


def epochs_processed(trainer: L.Trainer) -> int:
    """Return the epochs whose batches are over. It is greater than `current_epoch` in the hooks at the end of an epoch."""
    progress: Any = trainer.fit_loop.epoch_progress
    return int(progress.current.processed)


class ResumedModule(L.LightningModule):
    """Corrects what a resumed run would do otherwise, and knows in which hook a checkpoint is saved."""

    @property
    def _current_fx_name(self) -> str | None:
        return self.__dict__.get("hook")

    @_current_fx_name.setter
    def _current_fx_name(self, name: str | None) -> None:
        if name == "on_save_checkpoint":
            self.__dict__["saving_hook"] = self.__dict__.get("hook")
        self.__dict__["hook"] = name

    def configure_callbacks(self) -> Sequence[Callback]:
        """Let callbacks that average the weights come first, so that what others save at the end of a step is averaged."""
        callbacks_of(self.trainer).sort(key=lambda callback: not isinstance(callback, WeightAveraging))
        return []

    def on_validation_end(self) -> None:
        """Let the schedules that monitor the validation be stepped at the end of the epoch."""
        if not self.trainer.sanity_checking:
            end_resumed_epoch(self.trainer)

    def on_train_epoch_end(self) -> None:
        """Let the schedules that monitor the training be stepped."""
        end_resumed_epoch(self.trainer)


def running_hook(trainer: L.Trainer) -> str | None:
    """Return the name of the hook that is running, or that saves the checkpoint for which `on_save_checkpoint` runs."""
    untyped: Any = trainer.lightning_module
    name: str | None = untyped._current_fx_name
    return untyped.__dict__.get("saving_hook") if name == "on_save_checkpoint" else name


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
    resumed = trainer.ckpt_path is not None and loop.epoch_progress.current.ready > loop.epoch_progress.current.processed
    for callback in callbacks_of(trainer):
        # They do these things at the start of an epoch, where a resumed run was not.
        if isinstance(callback, GradientAccumulationScheduler):
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
        if isinstance(callback, StochasticWeightAveraging) and resumed:
            rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
            callback.on_train_epoch_start(trainer, trainer.lightning_module)
            for group, rate in zip(trainer.optimizers[0].param_groups, rates, strict=True):
                group["lr"] = rate  # which the new schedule has changed


def due_plateaus(trainer: L.Trainer) -> list[list[float]]:
    """Return the schedules that monitor a metric and are to be stepped after the running hook, each by number and metric."""
    hook, loop = running_hook(trainer), trainer.fit_loop.epoch_loop
    done = {"on_train_batch_end": ("step", loop.batch_idx), "on_train_epoch_end": ("epoch", trainer.current_epoch)}
    interval, index = done.get(hook or "", ("", 0))
    return [
        [number, float(trainer.callback_metrics[str(config.monitor)])]
        for number, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval == interval
        and (index + 1) % config.frequency == 0
        and config.monitor in trainer.callback_metrics
    ]


def step_plateaus(trainer: L.Trainer, due: list[list[float]]) -> None:
    """Step schedules that monitor a metric, as `due_plateaus` has found them."""
    for number, metric in due:
        scheduler: Any = trainer.lr_scheduler_configs[int(number)].scheduler
        scheduler.step(metric)


def end_resumed_epoch(trainer: L.Trainer) -> None:
    """Let the schedules that monitor a metric be stepped at the end of an epoch that was resumed, if the metrics are there.

    Lightning leaves them out, because a checkpoint holds no metrics. But a validation may have come after it.
    """
    monitored = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    if trainer.fit_loop.restarting and monitored <= trainer.callback_metrics.keys():
        untyped: Any = trainer.fit_loop
        untyped._restarting = False


def requeue_signal(trainer: L.Trainer) -> int | None:
    """Return the signal at which Lightning saves a checkpoint and has SLURM requeue the job, or None."""
    untyped: Any = trainer
    environment = untyped._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return None if environment.requeue_signal is None else int(environment.requeue_signal)


def requeued_path(trainer: L.Trainer) -> str | None:
    """Return the checkpoint that a job which SLURM requeued goes on from, or None."""
    connector = trainer._checkpoint_connector
    return connector._hpc_resume_path if SLURMEnvironment.detect() else None


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
