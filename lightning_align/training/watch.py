"""Ends the ranks of a run together, and lets them wait for each other as long as it takes."""

import signal
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_align.runtime.lightning_internals import callbacks_of, launched_processes, ranks_of
from lightning_align.runtime.patience import Patience
from lightning_align.runtime.rank_link import RankLink, link_of_group


class RankWatch(Callback):
    """Ends the run on all ranks within a minute if one of them dies or raises, with a message that names the rank.

    Every module of this package has one on several ranks. Another rank has ten seconds to end by itself. Then its process ends
    with exit status 1, because it may wait in a collective, where no exception reaches it.

    A module of your own gets one if its ``configure_callbacks`` calls `attach`. In the list of callbacks of a Trainer it does
    nothing: data are prepared before Lightning calls a callback.

    Barriers and broadcasts of the strategy wait in a group of their own, for up to 30 days; see `Patience`.
    """

    def __init__(self) -> None:
        """Start without a run."""
        self._run: int | None = None
        self._link: RankLink | None = None
        self._watched: L.Trainer | None = None
        self._patience = Patience()

    @classmethod
    def attach(cls, trainer: L.Trainer) -> None:
        """Watch the run that a Trainer begins, if it has several ranks. Call it before the process group is made.

        The callback comes first, so that the others learn of an error before another callback waits for them.

        Args:
            trainer: The Trainer of the run. ``configure_callbacks`` of its module is the place to call this.
        """
        if ranks_of(trainer) == 1:
            return
        callbacks = callbacks_of(trainer)
        watch = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if watch is None:
            watch = cls()
            callbacks.insert(0, watch)
        watch._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        link, self._watched = link_of_group(), trainer
        if link.active:
            return  # a run within a run, such as an encoder's; the outer one is watched
        link.explain, link.before_exit = self._explain, self._end_launched
        link.begin()
        self._run, self._link = link.run, link
        self._patience.begin(trainer.strategy)

    def _explain(self, rank: int) -> str:
        """Return how a process ended that this one has launched."""
        assert self._watched is not None
        code = launched_processes(self._watched).get(rank)
        status = None if code is None else code.poll()
        if status is None:
            return ""
        return (
            f"its process {'was killed by ' + signal.Signals(-status).name if status < 0 else f'ended with status {status}'}."
        )

    def _end_launched(self) -> None:
        assert self._watched is not None
        for process in launched_processes(self._watched).values():
            process.kill()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait until all ranks have validated their batches, before metrics are added up in the group of the training."""
        trainer.strategy.barrier("validated")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait as after a validation."""
        trainer.strategy.barrier("tested")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Complete the run."""
        self._patience.end()
        if self._link is not None and self._run == self._link.run and self._link.active:
            self._link.end()
            self._run = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tell the other ranks, or say which one caused the error."""
        self._patience.end()
        if self._link is None or self._run != self._link.run:
            return
        self._run = None
        loss = self._link.loss(seconds=3.0 if _is_of_collective(exception) else 0.0)
        text = f"{type(exception).__name__}: {exception}"[:500]
        if loss is not None and loss.why not in text and f"Rank {loss.rank} failed" not in text:
            exception.add_note(f"{loss}")
        self._link.fail(text if loss is None else f"{loss}"[:500])


def _is_of_collective(error: BaseException) -> bool:
    """Return whether an error may be that of a collective in which another rank is missing."""
    words: Any = ("gloo", "nccl", "peer", "socket", "connection")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
