"""Evaluation on several loaders: the metrics of each loader and of all together, and their names."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import lightning as L

from lightning_align.training.metrics import LoaderMetric
from lightning_align.training.tensorboard import META

M = TypeVar("M", bound=LoaderMetric)


def num_loaders(trainer: L.Trainer) -> int:
    """Return the number of loaders of the running validation or test."""
    if trainer.testing:
        return len(trainer.num_test_batches)
    return len(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)


def parts_of(metric: M, trainer: L.Trainer) -> list[M]:
    """Return the metric over the rows of each loader, in order. Empty with a single loader."""
    number = num_loaders(trainer)
    return [metric.part(loader) for loader in range(number)] if number > 1 else []


def metrics_of(metric: M, trainer: L.Trainer, loader: int) -> list[M]:
    """Return the metrics that a batch counts for: the one over all rows and, with several loaders, the one of its loader.

    Args:
        metric: The metric over all rows.
        trainer: The Trainer, in a validation or test.
        loader: The number of the loader of the batch.
    """
    return [metric, *(part for number, part in enumerate(parts_of(metric, trainer)) if number == loader)]


def logged_name(trainer: L.Trainer, name: str, loader: int | None) -> str:
    """Return the name under which to log a metric.

    Args:
        trainer: The Trainer, in a validation or test.
        name: The name of the metric, such as ``val/loss``.
        loader: The number of the loader. None for all rows.

    Returns:
        ``val/<loader>/loss`` if the loaders are given by name. Otherwise ``val/loss/loader_0``: Lightning keeps the word
        ``dataloader_idx`` for itself.
    """
    if loader is None:
        return name
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    if isinstance(loaders, Mapping):
        stage, _, rest = name.partition("/")
        return f"{stage}/{list(loaders)[loader]}/{rest}"
    return f"{name}/loader_{loader}"


def log_values(
    module: L.LightningModule,
    stage: str,
    values: Mapping[str, Any],
    *,
    loader: int | None = None,
    progress_bar: Sequence[str] = ("loss",),
    counts: Sequence[str] = (),
) -> None:
    """Log the values of a whole validation or test as ``<stage>/<name>``, and counts as ``meta/<stage>/<name>``.

    Args:
        module: The module, which logs.
        stage: ``val`` or ``test``.
        values: Scalars by name, of metrics that were reduced over ranks.
        loader: The number of the loader that the values are of; see `logged_name`. None for all rows.
        progress_bar: The names of the values that the progress bar shows. It shows those of all rows.
        counts: The names of the values that say how much there is and not how good it is.
    """
    for name, value in values.items():
        logged, shown = logged_name(module.trainer, f"{stage}/{name}", loader), loader is None and name in progress_bar
        logged = f"{META}{logged}" if name in counts else logged
        # The value is the same on every rank. sync_dist only tells Lightning so.
        module.log(logged, value, prog_bar=shown, sync_dist=True)


def log_metric(module: L.LightningModule, stage: str, metric: LoaderMetric, *, progress_bar: Sequence[str] = ("loss",)) -> None:
    """Log a metric over all rows and, with several loaders, over the rows of each. Reset it.

    Args:
        module: The module, which logs.
        stage: ``val`` or ``test``.
        metric: The metric, which computes scalars by name.
        progress_bar: See `log_values`.
    """
    for loader, part in [(None, metric), *enumerate(parts_of(metric, module.trainer))]:
        values = part.compute()
        part.reset()
        log_values(module, stage, values, loader=loader, progress_bar=progress_bar)
