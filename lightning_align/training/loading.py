"""The options of data loaders for the device of a Trainer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch

from lightning_align.scoring.targets import host_counts

PINNED = ("cuda", "xpu")
"""The devices that copy from pinned memory without making the host wait."""


def for_device(trainer: L.Trainer | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a `DataLoader` for the device of a Trainer. On a CPU they do not change.

    On other devices the batches are pinned, so that they are copied while the host goes on, and their targets and the tokens of
    each row are counted, so that no step has to ask the device for their numbers.

    Args:
        trainer: The Trainer. None stands for the CPU.
        options: The options of the loader.
    """
    device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
    if device.type == "cpu":
        return options
    pinned = device.type in PINNED and torch.accelerator.is_available()
    return {**options, "collate_fn": partial(_counted, options.get("collate_fn")), "pin_memory": pinned}


def _counted(collate: Callable[[Any], Any] | None, rows: Any) -> Any:
    return count_targets(rows if collate is None else collate(rows))


def count_targets(batch: Any) -> Any:
    """Return a batch with what `host_counts` counts of each `TokenBatch` in it. Tensors are not copied.

    Args:
        batch: A `TokenBatch` on the CPU, or a dictionary with such batches, or anything else, which is returned as it is.
    """
    if not isinstance(batch, dict):
        return batch
    if {"tokens", "mask", "targets"} <= batch.keys():
        return {**batch, **host_counts(batch)}  # type: ignore[arg-type]  # it has the keys of a TokenBatch
    return {name: count_targets(value) for name, value in batch.items()}
