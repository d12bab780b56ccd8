"""Where a run writes."""

import os
from pathlib import Path

import lightning as L

UNLOGGED = "runs/unlogged"
"""The folder of a `fit` on the command line that has no logger and names no folder."""


def run_folder(trainer: L.Trainer) -> Path:
    """Return the folder of the logger, or the default root without one. Call it on every rank: `log_dir` is a broadcast."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def records_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder for what a run writes unasked. Call it on every rank.

    It is the folder of the run. None if the run has no logger and names no folder, because Lightning then takes the working
    directory.
    """
    folder = run_folder(trainer)
    return folder if trainer.loggers or trainer.default_root_dir != os.getcwd() else None
