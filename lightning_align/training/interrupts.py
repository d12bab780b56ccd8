"""Signals that stop a run: each is answered where a checkpoint of the run is exact."""

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_align.runtime.lightning_internals import is_fast_dev_run, requeue_signal

SAME_SIGNAL = 30.0
"""Seconds in which a requeue signal to several ranks is one signal. SLURM sends it to all of them, but not at one moment."""


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
        self._answered = -math.inf

    def install(self, trainer: L.Trainer, is_settled: Callable[[L.Trainer], bool]) -> None:
        """Put the gate in front of Lightning's handler, which removes both at the end of the run.

        Args:
            trainer: The Trainer, after it registered its handlers.
            is_settled: Tells whether a checkpoint that is taken now is exact.
        """
        self._handler, self._pending, self._answered = None, False, -math.inf
        number = requeue_signal(trainer)
        handler = None if number is None else signal.getsignal(number)
        if number is None or not callable(handler) or threading.current_thread() is not threading.main_thread():
            return
        self._number, self._handler = number, handler

        def gate(number: int, frame: FrameType | None) -> None:
            if trainer.world_size == 1 and is_settled(trainer):
                handler(number, frame)
            elif time.monotonic() - self._answered > SAME_SIGNAL:
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
            if trainer.world_size > 1 and not self._pending:
                self._answered = time.monotonic()  # this rank's own signal is still to come
            self._pending = False
            self._handler(self._number, None)


class InterruptCheckpoint(Callback):
    """Saves a checkpoint and ends the run at SIGTERM and at Ctrl-C.

    The run ends after the micro-batch, with the exit status that shells expect: 143 and 130. Between batches, in a validation
    for example, it ends at once. With several ranks it ends after the micro-batch on all of them. A second Ctrl-C ends it at
    once, without a checkpoint.

    The checkpoint is the `last.ckpt` of a ModelCheckpoint with `save_last`, otherwise `interrupted.ckpt` beside the other
    checkpoints. A Trainer without a ModelCheckpoint saves none.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.path = ""
        """The checkpoint that was saved, or an empty string."""
        self.status = 0
        """The exit status of the signal that came, or 0."""
        self._in_batch = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals, before rows are scored or responses are generated."""
        self._install(trainer)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals."""
        self._install(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals."""
        self._install(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that signals must wait."""
        self._in_batch = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run if a signal has come to any rank."""
        self._in_batch = False
        status = self.status
        if trainer.world_size > 1:
            terminated, interrupted = 128 + signal.SIGTERM, 128 + signal.SIGINT
            if trainer.strategy.reduce_boolean_decision(status != 0, all=False):
                ends = trainer.strategy.reduce_boolean_decision(status == terminated, all=False)
                status = self.status = terminated if ends else interrupted
        if status:
            self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save after a signal that has ended something else first, such as a worker of the data loader."""
        if self.status and not self.path and trainer.world_size == 1 and not isinstance(exception, KeyboardInterrupt):
            ignore_workers()
            self._save(trainer)

    def _install(self, trainer: L.Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self.status and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.status = 128 + number
            ignore_workers()  # now: the end of one would raise an error anywhere, also while the checkpoint is saved
            if trainer.world_size == 1 and not self._in_batch:
                self._stop(trainer)

        # Lightning restores the handlers at the end of the run.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    def _stop(self, trainer: L.Trainer) -> None:
        ignore_workers()
        self._save(trainer)
        raise SystemExit(self.status)

    def _save(self, trainer: L.Trainer) -> None:
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if not callbacks or is_fast_dev_run(trainer) or trainer.global_step == 0:
            return
        path = Path(callbacks[0].dirpath or trainer.default_root_dir) / "interrupted.ckpt"
        for callback in callbacks:
            if callback.save_last and callback.dirpath is not None and not callback.save_weights_only:
                name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
                path = Path(callback.last_model_path or Path(callback.dirpath) / name)
                callback.last_model_path = str(path)  # set before saving, because the checkpoint contains it
                break
        if trainer.is_global_zero and path.is_symlink():
            path.unlink()  # otherwise the checkpoint behind the link would be overwritten
        trainer.strategy.barrier("interrupted")
        trainer.save_checkpoint(path, weights_only=False)
        self.path = str(path)


def ignore_workers() -> None:
    """Let the workers of a data loader end without an error while this process ends. A signal may have gone to them too."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
