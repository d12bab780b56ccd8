"""The states of data loaders of other packages, at the place of a checkpoint.

A state counts the batches that its loader has handed out. Those of an unfinished optimizer batch are among them, so a run that
is resumed from it would never train on them.
"""

from typing import Any

import lightning as L

from lightning_align.runtime.lightning_internals import fetches_ahead, loader_states


class LoaderStates:
    """Keeps the states as they were after the last optimizer step."""

    def __init__(self) -> None:
        """Start without loaders."""
        self.followed = False
        """Whether a loader of another package has a state. The loaders of this package are corrected by counting."""
        self._boundary: list[Any] = []
        self._before: list[Any] = []

    def begin(self, trainer: L.Trainer) -> None:
        """Look at the loaders of a run that begins.

        Args:
            trainer: The Trainer, with its training loaders.
        """
        self._boundary = self._before = states = loader_states(trainer)
        self.followed = any("num_yielded" not in state for state in states)

    def advance(self, trainer: L.Trainer, *, stepped: bool) -> None:
        """Look at the loaders at the end of a micro-batch.

        Args:
            trainer: The Trainer.
            stepped: Whether the optimizer has taken a step after it.
        """
        if self.followed:
            now = loader_states(trainer)
            if stepped:
                self._boundary = self._after_batch(trainer, now)
            self._before = now

    def at(self, trainer: L.Trainer, total: int, *, ahead: bool) -> list[Any]:
        """Return the states after the last optimizer step.

        Args:
            trainer: The Trainer.
            total: The micro-batches that the run has been trained on. Without any, there are no states to restore.
            ahead: Whether the optimizer has taken a step after the last call of `advance`.
        """
        if not total:
            return []
        return self._after_batch(trainer, loader_states(trainer)) if ahead else self._boundary

    def _after_batch(self, trainer: L.Trainer, now: list[Any]) -> list[Any]:
        return self._before if fetches_ahead(trainer) and not trainer.is_last_batch else now
