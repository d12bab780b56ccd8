"""The place of a run: which batches its weights have been trained on. Checkpoints resume there, whenever they are taken.

Lightning counts batches in its loops, and a data loader counts the batches that it has handed out. Inside a step, and inside
an accumulation window, these counts differ from what the weights have learned. So a checkpoint gets its place from one clock,
which advances with the optimizer. Batches of an unfinished optimizer batch are trained again after a resume.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.runtime.lightning_internals import (
    batch_counts,
    begin_resumed,
    epochs_processed,
    inside_update,
    running_hook,
    validation_pending,
)
from lightning_align.runtime.saved_loops import PlaceForm, place_of_loops, write_place
from lightning_align.training.interrupts import RequeueGate

KEY = "place"
"""Where a checkpoint keeps its place."""


@dataclass(frozen=True)
class Place:
    """A boundary between two optimizer steps.

    Args:
        epoch: The epoch, from 0.
        batches: The micro-batches of the epoch that the weights have been trained on.
        last: Whether these are all micro-batches of the epoch.
        total: The micro-batches of the whole run that the weights have been trained on.
        stepped: The optimizer steps that Lightning's loggers count.
        due: Whether a validation is due after these batches and has not ended.
    """

    epoch: int
    batches: int
    last: bool
    total: int
    stepped: int
    due: bool = False


@dataclass(frozen=True)
class _Begun:
    """The micro-batch that has begun, and the optimizer steps before it."""

    before: Place
    last: bool
    steps: int


class Clock:
    """Counts what the weights have been trained on, from the optimizer steps."""

    def __init__(self) -> None:
        """Start without a run."""
        self._owner: int | None = None
        self._boundary: Place | None = None
        self._begun: _Begun | None = None
        self._known = True
        self._updating = False
        self._requeue = RequeueGate()

    def attach(self, trainer: L.Trainer, stage: str) -> None:
        """Start a run at a `fit`. Other commands of the same Trainer keep the place, and those of other Trainers have none."""
        if stage == "fit" or id(trainer) != self._owner:
            self.__init__()  # type: ignore[misc]
            self._owner = id(trainer) if stage == "fit" else None

    def begin_run(self, trainer: L.Trainer) -> None:
        """Correct the loops of a resumed run, and delay SLURM's requeue signal where a checkpoint would not be exact."""
        place = self._boundary
        begin_resumed(trainer, due=self._begun is None and place is not None and place.due)
        self._requeue.install(trainer, self._is_settled)

    def begin_batch(self, trainer: L.Trainer, index: int) -> None:
        """Note that a micro-batch begins.

        Args:
            trainer: The Trainer.
            index: The number of the micro-batch in the epoch.
        """
        steps = trainer.global_step
        total, stepped = batch_counts(trainer)
        before = Place(trainer.current_epoch, index, False, total - 1, stepped)
        if self._begun is None or index == 0 or steps != self._begun.steps:
            self._boundary = before
        self._begun = _Begun(before, trainer.is_last_batch, steps)
        self._updating = False

    def begin_update(self) -> None:
        """Note that the optimizer is about to change the weights."""
        self._updating = True

    def end_batch(self, trainer: L.Trainer) -> None:
        """Note that the weights, the schedule and the callbacks have all taken the step. Answer a signal that waited for it."""
        self._updating = False
        self._requeue.act(trainer)

    def _is_settled(self, trainer: L.Trainer) -> bool:
        # In that hook the schedule has taken its step.
        return not self._updating or running_hook(trainer) == "on_train_batch_end"

    def place(self, trainer: L.Trainer) -> tuple[Place, PlaceForm] | None:
        """Return the place of the weights, and how far the run is there. None for a checkpoint of an unknown place."""
        begun, place = self._begun, self._boundary
        if begun is not None and trainer.global_step > begun.steps:
            at = begun.before
            place = Place(at.epoch, at.batches + 1, begun.last, at.total + 1, at.stepped + 1, validation_pending(trainer))
        elif place is not None and begun is None:
            place = replace(place, due=place.due and running_hook(trainer) != "on_validation_end")
        elif place is None:
            if not self._known:
                return None
            place = Place(epochs_processed(trainer), 0, False, *batch_counts(trainer))
        if place.batches == 0:
            return place, "begin"
        if place.last and epochs_processed(trainer) > place.epoch:
            return replace(place, epoch=place.epoch + 1, batches=0, last=False), "begin"
        if place.due:
            return place, "due"
        if running_hook(trainer) == "on_validation_end" and self._at_current(trainer):
            return place, "validated"
        return place, "trained"

    def _at_current(self, trainer: L.Trainer) -> bool:
        return self._begun is None or trainer.global_step > self._begun.steps

    def save(self, checkpoint: dict[str, Any], trainer: L.Trainer | None) -> None:
        """Write the place into a checkpoint. A module that overrides `on_save_checkpoint` must call this.

        Args:
            checkpoint: The whole checkpoint, with ``loops``.
            trainer: The Trainer of the module, if it has one.
        """
        if trainer is None or id(trainer) != self._owner:
            return
        found = self.place(trainer)
        if found is None:
            return
        place, form = found
        torn = self._updating and inside_update(trainer)
        if torn:
            rank_zero_warn(
                "A checkpoint is saved in the middle of an optimizer step. Some of its weights have taken the step and others "
                "have not, so no run can resume from it. Its weights can be loaded with `init_from`."
            )
        write_place(
            checkpoint["loops"]["fit_loop"],
            epoch=place.epoch,
            batches=place.batches,
            last=place.last,
            total=place.total,
            stepped=place.stepped,
            form=form,
        )
        checkpoint[KEY] = {**asdict(place), "torn": torn}

    def load(self, checkpoint: dict[str, Any], trainer: L.Trainer | None) -> None:
        """Read the place that a `fit` resumes from. A module that overrides `on_load_checkpoint` must call this.

        Args:
            checkpoint: The whole checkpoint. The loops of one that an earlier release saved are corrected in place.
            trainer: The Trainer of the module, if it has one.

        Raises:
            ValueError: If the checkpoint was saved in the middle of an optimizer step.
        """
        if trainer is None or id(trainer) != self._owner:
            return
        saved = checkpoint.get(KEY)
        self._known = False
        if saved is not None:
            saved = dict(saved)
            if saved.pop("torn"):
                raise ValueError(
                    f"The checkpoint {trainer.ckpt_path} was saved in the middle of an optimizer step, so no run can "
                    "resume from it. Resume from an earlier checkpoint, or start a new run with `init_from`."
                )
            self._boundary = Place(**saved)
            return
        loops = checkpoint.get("loops", {}).get("fit_loop")
        found = None if loops is None else place_of_loops(loops, accumulated=trainer.accumulate_grad_batches)
        if found is not None:
            write_place(loops, **found)
