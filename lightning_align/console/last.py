"""``runs/<name>/last.ckpt``: a link to the last checkpoint of the newest run of a name, so that commands need no version."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_align.runtime.files import temporary_path
from lightning_align.runtime.lightning_internals import is_fast_dev_run

NAME = "last.ckpt"


class LastLink(Callback):
    """Links ``runs/<name>/last.ckpt`` to the newest ``last.ckpt`` of a run, whenever that is saved elsewhere than before."""

    def __init__(self) -> None:
        self._linked = ""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Link what the last step saved."""
        self.link(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Link what the end of the run saved."""
        self.link(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Link what was saved before the run stopped."""
        self.link(trainer)

    def link(self, trainer: L.Trainer) -> None:
        """Update the link. It does nothing if the run has no folder of a version, or links cannot be made there."""
        saved = last_checkpoint(trainer)
        if saved is None or str(saved) == self._linked:
            return
        self._linked, place = str(saved), link_of(trainer)
        if place is None or (place.exists() and not place.is_symlink()):  # a checkpoint of the user's own
            return
        temporary = temporary_path(place)
        with suppress(OSError):
            temporary.symlink_to(os.path.relpath(saved.resolve(), place.parent.resolve()))
            os.replace(temporary, place)


def last_checkpoint(trainer: L.Trainer) -> Path | None:
    """Return the ``last.ckpt`` of a run, if it is saved and this process is the first."""
    if not trainer.is_global_zero or is_fast_dev_run(trainer):
        return None
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    paths = [Path(callback.last_model_path) for callback in callbacks if callback.save_last and callback.last_model_path]
    return next((path for path in paths if path.exists()), None)


def link_of(trainer: L.Trainer) -> Path | None:
    """Return the place of the link: beside the folders of the versions."""
    # Not `trainer.log_dir`, which waits for all ranks.
    folder = next((Path(path) for logger in trainer.loggers if (path := getattr(logger, "log_dir", None))), None)
    return folder.parent / NAME if folder is not None and re.fullmatch(r"version_\d+", folder.name) else None
