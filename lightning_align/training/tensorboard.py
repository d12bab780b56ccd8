"""What is written to TensorBoard besides logged values."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import custom_scalars, hparams

from lightning_align.runtime.lightning_internals import add_summary


def log_hyperparameters(
    loggers: Iterable[Any], hyperparameters: Mapping[str, bool | int | float | str], *, metric: str
) -> None:
    """Register a run in TensorBoard's HPARAMS tab.

    Args:
        loggers: The module's loggers; all but `TensorBoardLogger` are skipped.
        hyperparameters: The values by name.
        metric: The logged value that runs are compared by.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(dict(hyperparameters), {metric: 0.0}):
                add_summary(logger, summary)


Charts = Mapping[str, Sequence[str]]
"""The lines of each chart: logged names by title. A `*` stands for anything. A name, and the same with `_low` and with `_high`,
are a line in a band."""
META = "meta/"
"""Where counts are logged that say nothing about the quality of a model."""
BASE_CHARTS: Charts = {
    "loss: training and validation": ("train/loss", "val/loss"),
    "norm of the gradient, before clipping": ("train/grad_norm",),
    "learning rate": ("train/lr",),
    "tokens per second": ("train/tokens_per_second",),
}
"""Charts of every method: the first, then those of the method, then the others."""


def log_charts(loggers: Iterable[Any], title: str, charts: Charts) -> None:
    """Lay out charts in TensorBoard's tab CUSTOM SCALARS that answer whether a run goes well.

    Args:
        loggers: The module's loggers; all but `TensorBoardLogger` are skipped.
        title: The title of the group of charts.
        charts: The charts.
    """
    layout = {name: _chart(lines) for name, lines in charts.items()}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            add_summary(logger, custom_scalars({title: layout}))


def all_charts(own: Charts, others: Iterable[Charts]) -> Charts:
    """Return the charts of a method and of callbacks, with those of every method around them."""
    (first, lines), *rest = BASE_CHARTS.items()
    merged = {first: lines, **own}
    for charts in others:
        merged |= charts
    return merged | dict(rest)


def _chart(lines: Sequence[str]) -> list[Any]:
    if len(lines) == 3 and lines[1] == f"{lines[0]}_low" and lines[2] == f"{lines[0]}_high":
        return ["Margin", list(lines)]
    patterns = [re.escape(line).replace(r"\*", ".*") for line in lines]  # TensorBoard takes names as patterns
    return ["Multiline", [f"^{pattern}$" for pattern in patterns]]
