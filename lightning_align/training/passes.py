"""The batches that a run will ask its loaders for, as the limits of the Trainer say."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.utilities import CombinedLoader

from lightning_align.data.batching import ResumableLoader
from lightning_align.runtime.lightning_internals import new_loaders, overfits


class Pass(NamedTuple):
    """A loader, apart from the Trainer's own, and how much of it a run will use."""

    loader: Iterable[Any]
    num_batches: int | None
    """The number of batches to take. None takes all. 0 if nothing limits a loader that may be endless."""
    is_complete: bool
    """Whether these are all the rows that the run will see. The batches of later epochs may have other rows."""

    def batches(self) -> Iterator[Any]:
        """Yield the batches."""
        # Not even an iterator of a loader that gives none, because it may start processes.
        return iter(()) if self.num_batches == 0 else islice(iter(self.loader), self.num_batches)


def passes_of(trainer: L.Trainer) -> list[Pass]:
    """List the training loader and the validation loaders of a fit, with the limits of the Trainer.

    Args:
        trainer: The Trainer, in a fit.
    """
    train, *validation = new_loaders(trainer)
    passes = []
    for loader in _flat(train):
        size = _size(loader)
        limit = _limited(size, trainer.limit_train_batches)
        steps = None if trainer.max_steps < 0 else trainer.max_steps * trainer.accumulate_grad_batches
        num_batches = min((number for number in (limit, steps) if number is not None), default=0)
        # The order of such a loader depends on the epoch alone, so the batches of the first epoch are known.
        is_one_epoch = trainer.max_epochs == 1 or (steps is not None and (limit is None or steps <= limit))
        is_known = isinstance(loader, ResumableLoader) and (is_one_epoch or overfits(trainer))
        is_complete = size is not None and (num_batches >= size or is_known)
        passes.append(Pass(loader, num_batches, is_complete))
    for loaders in validation:
        for loader in _flat(loaders):
            passes.append(Pass(loader, _limited(_size(loader), trainer.limit_val_batches), is_complete=True))
    return passes


def _flat(loaders: Any) -> list[Any]:
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    return combined.flattened


def _size(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None  # its dataset is an iterable


def _limited(size: int | None, limit: int | float | None) -> int | None:
    """Return how many of a loader's batches a limit of the Trainer lets through, as the Trainer computes it."""
    if limit is None:
        return size
    if isinstance(limit, int):
        return limit if size is None else min(size, limit)
    return (0 if limit == 0 else None) if size is None else int(size * limit)
