"""The progress bar of a run: the step, the number of steps and the time left, and where things are at the end."""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_align.console.last import link_of
from lightning_align.export.callback import ExportModel
from lightning_align.runtime.lightning_internals import batches_in_epoch, callbacks_of, is_fast_dev_run


class RunProgress(TQDMProgressBar):
    """One bar for the whole training, in optimizer steps: ``Step: 12%|#2 | 120/1000 [00:10<01:13, 12.0it/s, ...]``.

    Lightning's bars count the batches of an epoch. Of a run that is limited by steps they do not show the time left.
    """

    @classmethod
    def install(cls, trainer: L.Trainer, *, configured: bool) -> None:
        """Replace Lightning's bar.

        Args:
            trainer: The Trainer.
            configured: Whether the user has chosen a bar. A `RichProgressBar` then stays one, and counts steps.
        """
        callbacks = callbacks_of(trainer)
        for index, callback in enumerate(callbacks):
            if not isinstance(callback, (TQDMProgressBar, RichProgressBar)):
                continue
            if type(callback) not in (TQDMProgressBar, RichProgressBar):  # a class of the user's own
                continue
            if configured and type(callback) is RichProgressBar:
                callbacks[index] = RichRunProgress.like(callback)
                continue
            # In the log of a job, rich would write rarely, and this bar goes by time.
            bar = cls(refresh_rate=callback.refresh_rate if isinstance(callback, TQDMProgressBar) else 1)
            if callback.is_disabled:
                bar.disable()
            callbacks[index] = bar

    @property
    def train_description(self) -> str:
        """The text before the bar."""
        return "Step"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step that a resumed run begins with."""
        bar = self.train_progress_bar = self.init_train_tqdm()
        bar.total = total_steps(trainer)
        bar.initial = bar.n = trainer.global_step
        self._shown = time.monotonic()
        bar.refresh()

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Show the epoch, and the total again: the rows of an epoch may have changed."""
        bar = self.train_progress_bar
        bar.total = total_steps(trainer)
        bar.set_description(description(trainer), refresh=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step after an optimizer step: ten times a second at most, and seldom in the log of a job."""
        bar, step, now = self.train_progress_bar, trainer.global_step, time.monotonic()
        pause = 0.1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 10.0
        due = step == bar.total or (now - self._shown >= pause and step % self.refresh_rate == 0)
        if step != bar.n and due and not bar.disable:
            self._shown, bar.n = now, step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the metrics of the epoch."""
        if not self.train_progress_bar.disable:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the step with the metrics of the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.train_progress_bar.n = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Show the last step and close the bar."""
        bar = self.train_progress_bar
        if bar.n != trainer.global_step:
            bar.n = trainer.global_step
            bar.refresh()
        bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that messages begin on a line of their own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Leave out the number of the version, which the end of the run names with the folder."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class RichRunProgress(RichProgressBar):
    """The bar of rich in optimizer steps of the whole training. Lightning's says `Epoch 0/-2` if steps limit the run."""

    @classmethod
    def like(cls, bar: RichProgressBar) -> "RichRunProgress":
        """Return a bar with the settings of one of Lightning's."""
        own = cls.__new__(cls)
        vars(own).update(vars(bar))
        return own

    @property
    def total_train_batches(self) -> int | float:
        """The number of steps. Infinite if nothing limits them."""
        total = total_steps(self.trainer)
        return math.inf if total is None else total

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar at the step of the run, or go on with it in another epoch."""
        if self.is_disabled:
            return
        begun = self.train_progress_bar_id is not None and not self._leave
        if not begun:
            super().on_train_epoch_start(trainer, pl_module)
        assert self.progress is not None
        assert self.train_progress_bar_id is not None
        bar, total, text = self.train_progress_bar_id, self.total_train_batches, description(trainer)
        if begun:
            self.progress.update(bar, total=total, description=text)
        else:  # a step that is reached by a reset has no speed
            self.progress.reset(bar, total=total, completed=trainer.global_step, visible=True, description=text)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def _get_train_description(self, current_epoch: int) -> str:
        return description(self.trainer)


def description(trainer: L.Trainer) -> str:
    """Return the text before the bar: ``Step (epoch 2)``, with the number of epochs if these limit the run."""
    limit = trainer.max_epochs
    of = f"/{limit}" if limit is not None and limit > 0 else ""
    return f"Step (epoch {trainer.current_epoch + 1}{of})"


def total_steps(trainer: L.Trainer) -> int | None:
    """Return the optimizer steps of the whole run, or None if neither steps nor epochs limit it."""
    epochs, batches, steps = trainer.max_epochs, trainer.num_training_batches, trainer.max_steps
    limits = [float(steps)] if steps >= 0 else []
    if epochs is not None and epochs >= 0 and math.isfinite(batches):
        left = max(0, epochs - trainer.current_epoch)
        per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        begun = batches_in_epoch(trainer) // trainer.accumulate_grad_batches
        limits.append(trainer.global_step - begun * (left > 0) + left * per_epoch)
    return int(min(limits)) if limits else None


def places(trainer: L.Trainer) -> Iterator[str]:
    """Yield lines that say where the checkpoint, the log and the export of a run are."""
    if is_fast_dev_run(trainer):
        return
    checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    seen: set[str] = set()
    for callback in checkpoints:
        for kind, path in (("checkpoint", callback.last_model_path), ("best", callback.best_model_path)):
            if not path or path in seen or not Path(path).exists():
                continue
            seen.add(path)
            if kind == "best" and callback.monitor is None and callback.last_model_path:
                continue  # without a metric it is merely the newest
            note = "" if kind == "checkpoint" or callback.monitor is None else f" (best {callback.monitor})"
            link = link_of(trainer) if kind == "checkpoint" else None
            if link is not None and link.is_symlink() and link.resolve() == Path(path).resolve():
                note = f" (the newest of this name: {_relative(link)})"
            yield f"checkpoint: {_relative(path)}{note}"
    if trainer.loggers and (folder := trainer.log_dir or trainer.loggers[0].save_dir):
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        show = f" (tensorboard --logdir {_relative(boards[0].save_dir)})" if boards else ""
        yield f"log: {_relative(folder)}{show}"
    exports = [callback for callback in callbacks_of(trainer) if isinstance(callback, ExportModel)]
    yield from (f"export: {_relative(export.place(trainer))}" for export in exports)


def announce_places(trainer: L.Trainer) -> None:
    """Print where things are."""
    lines = list(places(trainer))  # on every rank, because `log_dir` is a broadcast
    if lines:
        rank_zero_info("\n".join(lines))


def _relative(path: str | Path) -> str:
    found = Path(path)
    return str(found.relative_to(Path.cwd())) if found.is_absolute() and found.is_relative_to(Path.cwd()) else str(found)


def has_own_bar(callbacks: Any) -> bool:
    """Return whether a configuration's callbacks include a progress bar."""
    found = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [str(callback.get("class_path", "")) for callback in found if hasattr(callback, "get")]
    return any(path.endswith("ProgressBar") for path in paths)
