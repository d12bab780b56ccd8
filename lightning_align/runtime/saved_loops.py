"""The state of Lightning's fit loop in a checkpoint: how a place of the run is written, and how one is found.

Lightning resumes exactly from some of the states that it can save, and from others it skips or repeats batches. These functions
write the former. They were checked on the release that `lightning_internals` names.
"""

from collections.abc import Sequence
from typing import Any, Literal

PlaceForm = Literal["begin", "trained", "due", "validated"]
"""How far a run is at a place: an epoch begins, a batch is trained, its validation is due, or its validation has ended."""


def write_place(
    loops: dict[str, Any],
    *,
    epoch: int,
    batches: int,
    last: bool,
    total: int,
    stepped: int,
    form: PlaceForm,
    lengths: Sequence[int] = (),
) -> None:
    """Write a place into the saved state of the fit loop, as Lightning resumes from it.

    Args:
        loops: The state of the fit loop, changed in place.
        epoch: The epoch, from 0. With the form ``begin``, the number of complete epochs.
        batches: The micro-batches of the epoch that were trained.
        last: Whether these are all.
        total: The micro-batches of the run that were trained.
        stepped: The steps that loggers count.
        form: How far the run is.
        lengths: The batches of each loader, if there are several, and those that end early begin again.
    """
    begins = form == "begin"
    epochs = loops["epoch_progress"]
    offset = epochs["total"]["processed"] - epochs["current"]["processed"]
    for name, more in (("total", offset), ("current", 0)):
        epochs[name] |= dict.fromkeys(("ready", "started"), epoch + more + (0 if begins else 1))
        epochs[name] |= dict.fromkeys(("processed", "completed"), epoch + more)
    states = [state for state in loops.get("state_dict", {}).get("combined_loader", []) if "num_yielded" in state]
    ended = last and not begins
    # Without a validation, Lightning asks for a batch before it ends the epoch. Only a loader of ours has none.
    runs_out = ended and form == "trained" and len(states) == 1
    count = 0 if begins else batches
    progress = loops["epoch_loop.batch_progress"]
    for name, number in (("total", total), ("current", count)):
        progress[name] |= dict.fromkeys(("ready", "started", "processed", "completed"), number)
        if form == "trained" and not runs_out:
            progress[name]["completed"] -= 1  # as in the hook at the end of the batch
    progress["is_last_batch"] = ended
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for name in ("total", "current"):
        # One batch begun and none completed: Lightning goes back to the validation and runs all of it.
        validation[name] |= dict.fromkeys(("ready", "started"), int(form == "due")) | {"processed": 0, "completed": 0}
    validation["is_last_batch"] = False
    for tracker in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        for counts in tracker.values():
            counts |= dict.fromkeys(counts, counts["completed"])
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = stepped if begins or runs_out else stepped - 1
    for number, state in enumerate(loops.get("state_dict", {}).get("combined_loader", [])):
        if "num_yielded" in state:
            yielded = batches % lengths[number] if lengths else batches
            state |= {"epoch": epoch, "num_yielded": 0 if ended or begins else yielded, "ended": ended}


def place_of_loops(loops: dict[str, Any], *, accumulated: int) -> dict[str, Any] | None:
    """Find the place of a checkpoint of an earlier release, if Lightning would not resume there.

    Args:
        loops: The saved state of the fit loop.
        accumulated: The number of micro-batches per optimizer step.

    Returns:
        The arguments of `write_place`, or None if Lightning resumes at the right place.
    """
    epochs, progress = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    batch, total, last = progress["current"], progress["total"]["ready"], progress["is_last_batch"]
    stepped = loops["epoch_loop.state_dict"].get("_batches_that_stepped", 0)
    done = epochs["processed"]
    if epochs["ready"] > done and batch["ready"] > batch["processed"]:  # inside a step
        whole = batch["completed"] // accumulated * accumulated
        form: PlaceForm = "trained" if whole else "begin"
        rest = {"last": False, "total": total - batch["ready"] + whole, "stepped": stepped, "form": form}
        return {"epoch": done, "batches": whole, **rest}
    if not done or epochs["ready"] != done:
        return None
    if last:  # at the end of an epoch or after it
        return {"epoch": done, "batches": 0, "last": False, "total": total, "stepped": stepped, "form": "begin"}
    if batch["ready"] != batch["completed"] or not batch["ready"]:
        return None
    # After a fit that ended by steps.
    rest = {"last": False, "total": total, "stepped": stepped, "form": "trained"}
    return {"epoch": done - 1, "batches": batch["ready"], **rest}
