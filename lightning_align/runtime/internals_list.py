"""The list of the private or undocumented parts of Lightning that `lightning_internals` uses."""

from typing import NamedTuple

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
    Internal("lightning.pytorch.Trainer().fit_loop._combined_loader", "a checkpoint holds the state of each training loader"),
    Internal("lightning.pytorch.utilities.combined_loader.CombinedLoader._state_dicts", "as above"),
    Internal("lightning.pytorch.utilities.combined_loader.CombinedLoader()._mode", "a loader may begin again in an epoch"),
    Internal("lightning.fabric.utilities.types._Stateful", "tells which loaders have a state"),
    Internal("lightning.pytorch.loops.fetchers._PrefetchDataFetcher", "fetches one batch ahead if the loader has no length"),
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
    Internal(
        "lightning.pytorch.callbacks.WeightAveraging._swap_models",
        "a checkpoint that is taken in a validation must not take the average of the weights for the weights",
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
