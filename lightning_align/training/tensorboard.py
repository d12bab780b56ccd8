"""What is written to TensorBoard besides logged values."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lightning_align.runtime.lightning_internals import add_summary

HIDDEN = ("_instantiator", "generation")
"""Hyperparameters that are not shown: they have no part in the loss."""


def log_hyperparameters(loggers: Iterable[Any], hyperparameters: Mapping[str, Any], *, metric: str) -> None:
    """Register a run in TensorBoard's HPARAMS tab.

    Args:
        loggers: The module's loggers; all but `TensorBoardLogger` are skipped.
        hyperparameters: May be nested.
        metric: The logged value that runs are compared by.
    """
    shown = {name: value for name, value in hyperparameters.items() if name not in HIDDEN}
    flat = {name: value for name, value in flatten(shown) if value is not None}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(flat, {metric: 0.0}):
                add_summary(logger, summary)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested hyperparameters as ``a/b``, with values that TensorBoard can show."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
