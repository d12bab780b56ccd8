"""Signals that stop a run: each is answered where a checkpoint of the run is exact."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L

from lightning_align.runtime.lightning_internals import requeue_signal


class RequeueGate:
    """Delays SLURM's requeue signal until a checkpoint is exact.

    Lightning saves in the signal handler, wherever the run is. That is right between two optimizer steps, and also in the
    forward and backward pass, because the clock of the module knows what the weights were trained on. Inside an optimizer step
    the handler waits for its end. With several ranks it waits for the end of the batch, because saving is a collective.
    """

    def __init__(self) -> None:
        """Start without a Trainer."""
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._number = 0
        self._pending = False

    def install(self, trainer: L.Trainer, is_settled: Callable[[L.Trainer], bool]) -> None:
        """Put the gate in front of Lightning's handler, which removes both at the end of the run.

        Args:
            trainer: The Trainer, after it registered its handlers.
            is_settled: Tells whether a checkpoint that is taken now is exact.
        """
        self._handler, self._pending = None, False
        number = requeue_signal(trainer)
        handler = None if number is None else signal.getsignal(number)
        if number is None or not callable(handler) or threading.current_thread() is not threading.main_thread():
            return
        self._number, self._handler = number, handler

        def gate(number: int, frame: FrameType | None) -> None:
            if trainer.world_size == 1 and is_settled(trainer):
                handler(number, frame)
            else:
                self._pending = True

        signal.signal(number, gate)

    def act(self, trainer: L.Trainer) -> None:
        """Answer a signal that had to wait. Every rank must call this at the end of each batch."""
        if self._handler is None:
            return
        due = self._pending
        if trainer.world_size > 1:
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if due:
            self._pending = False
            self._handler(self._number, None)
