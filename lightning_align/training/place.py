"""The place of a run: which batches its weights have been trained on. Checkpoints resume there, whenever they are taken.

Lightning counts batches in its loops, and a data loader counts the batches that it has handed out. Inside a step, and inside
an accumulation window, these counts differ from what the weights have learned. So a checkpoint gets its place from one clock,
which advances with the optimizer. Batches of an unfinished optimizer batch are trained again after a resume.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.runtime.lightning_internals import (
    averages,
    batch_counts,
    begin_resumed,
    due_plateaus,
    epochs_processed,
    inside_update,
    lengths_of_cycles,
    running_hook,
    step_plateaus,
    validation_pending,
    watch_swaps,
)
from lightning_align.runtime.saved_loops import PlaceForm, place_of_loops, write_place
from lightning_align.training.checked_loads import METHOD, PRECISION, check_method, method_of, warn_of_precision
from lightning_align.training.interrupts import RequeueGate
from lightning_align.training.loader_states import LoaderStates

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


_NUMBERS = ("epoch", "batches", "last", "total", "stepped")


def readable_place(saved: Any, path: Any) -> dict[str, Any]:
    """Return the place that a checkpoint holds, with what is saved beside it.

    Raises:
        ValueError: If a part of it is missing, or is no number.
    """
    found = dict(saved) if isinstance(saved, Mapping) else {}
    if not all(isinstance(found.get(name), int) and found[name] >= 0 for name in (*_NUMBERS, "torn")):
        raise ValueError(
            f"checkpoint {path} cannot be read (its place in the run is incomplete). Use an earlier checkpoint of the run."
        )
    return found


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
        self._averaged: bool | None = False
        self._requeue = RequeueGate()
        self._loaders = LoaderStates()
        self._plateaus: list[list[float]] = []

    def attach(self, trainer: L.Trainer, stage: str) -> None:
        """Start a run at a `fit`. Other commands of the same Trainer keep the place, and those of other Trainers have none."""
        if stage == "fit" or id(trainer) != self._owner:
            self.__init__()  # type: ignore[misc]
            self._owner = id(trainer) if stage == "fit" else None
        if stage == "fit":
            watch_swaps(trainer, self._note_average)

    def begin_run(self, trainer: L.Trainer) -> None:
        """Correct the loops of a resumed run, and delay SLURM's requeue signal where a checkpoint would not be exact."""
        place = self._boundary
        begin_resumed(trainer, due=self._begun is None and place is not None and place.due)
        self._loaders.begin(trainer)
        step_plateaus(trainer, self._plateaus)
        self._plateaus = []
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
        self._loaders.advance(trainer, stepped=self._at_current(trainer))
        self._requeue.act(trainer)

    def _is_settled(self, trainer: L.Trainer) -> bool:
        if self._averaged is None:
            return False
        # In that hook the schedule has taken its step, but perhaps not the average of the weights.
        return not self._updating or (running_hook(trainer) == "on_train_batch_end" and not averages(trainer))

    def _note_average(self, averaged: bool | None) -> None:
        self._averaged = averaged

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

    def _steps_in_batch(self, trainer: L.Trainer) -> bool:
        """Return whether the optimizer has taken its step, and the batch has not ended yet."""
        return self._updating and self._at_current(trainer)

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
        checkpoint |= {METHOD: method_of(trainer.lightning_module), PRECISION: str(trainer.precision)}
        torn = self._updating and inside_update(trainer)
        if torn:
            rank_zero_warn(
                "A checkpoint is saved in the middle of an optimizer step. Some of its weights have taken the step and others "
                "have not, so no run can resume from it. Its weights can be loaded with `init_from`."
            )
        loops = checkpoint["loops"]["fit_loop"]
        if self._loaders.followed and "combined_loader" in loops["state_dict"]:
            loops["state_dict"]["combined_loader"] = self._loaders.at(trainer, place.total, ahead=self._steps_in_batch(trainer))
        write_place(
            loops,
            epoch=place.epoch,
            batches=place.batches,
            last=place.last,
            total=place.total,
            stepped=place.stepped,
            form=form,
            lengths=lengths_of_cycles(trainer),
        )
        checkpoint[KEY] = {
            **asdict(place),
            "torn": torn,
            "plateaus": due_plateaus(trainer) if self._at_current(trainer) else [],
        }
        if self._averaged and "current_model_state" in checkpoint:
            # In a validation, where a WeightAveraging takes one for the other.
            weights, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint |= {"state_dict": average, "current_model_state": weights}

    def load(self, checkpoint: dict[str, Any], trainer: L.Trainer | None) -> None:
        """Read the place that a `fit` resumes from. A module that overrides `on_load_checkpoint` must call this.

        Args:
            checkpoint: The whole checkpoint. The loops of one that an earlier release saved are corrected in place.
            trainer: The Trainer of the module, if it has one.

        Raises:
            ValueError: If the checkpoint was saved in the middle of an optimizer step, or holds weights only.
        """
        if trainer is None or id(trainer) != self._owner:
            return
        if "state_dict" in checkpoint and "optimizer_states" not in checkpoint:
            raise ValueError(
                f"The checkpoint {trainer.ckpt_path} holds weights only, so no run can resume from it. Give it as `init_from`, "
                "or resume from a checkpoint of a ModelCheckpoint without `save_weights_only`."
            )
        check_method(checkpoint.get(METHOD), trainer.lightning_module, trainer.ckpt_path)
        warn_of_precision(checkpoint.get(PRECISION), trainer)
        saved = checkpoint.get(KEY)
        self._known = False
        if saved is not None:
            saved = readable_place(saved, trainer.ckpt_path)
            if saved["torn"]:
                raise ValueError(
                    f"The checkpoint {trainer.ckpt_path} was saved in the middle of an optimizer step, so no run can "
                    "resume from it. Resume from an earlier checkpoint, or start a new run with `init_from`."
                )
            self._plateaus = saved.get("plateaus", [])
            self._boundary = Place(**{name: saved[name] for name in _NUMBERS}, due=bool(saved.get("due", False)))
            return
        loops = checkpoint.get("loops", {}).get("fit_loop")
        found = None if loops is None else place_of_loops(loops, accumulated=trainer.accumulate_grad_batches)
        if found is not None:
            write_place(loops, **found)
