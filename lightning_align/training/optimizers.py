"""The optimizer of a run: parameter groups, and how Lightning steps a schedule."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Group the parameters that train: matrices, then gains and biases without weight decay."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if p.ndim >= 2]}]
    if vectors := [p for p in trained if p.ndim < 2]:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return groups


def schedule_config(scheduler: LRScheduler | Any) -> dict[str, Any]:
    """Return Lightning's configuration of a scheduler.

    A scheduler is stepped after every optimizer step. One that waits for a metric, such as `ReduceLROnPlateau`, is stepped
    after each epoch, since the metric has a new value only after a validation.
    """
    if (monitor := getattr(scheduler, "monitor", None)) is not None:
        return {"scheduler": scheduler, "monitor": monitor}
    return {"scheduler": scheduler, "interval": "step"}


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    make_optimizer: OptimizerCallable | None,
    make_schedule: LRSchedulerCallable | None,
    *,
    lr: float,
    found_lr: float | None = None,
) -> OptimizerLRScheduler:
    """Make the optimizer of the parameters that train, and the schedule.

    Args:
        parameters: All parameters.
        make_optimizer: A factory that gets the parameter groups. None makes AdamW.
        make_schedule: A factory that gets the optimizer. None makes no schedule.
        lr: The learning rate of AdamW.
        found_lr: A learning rate that replaces the one of the factory, in all groups.
    """
    groups = parameter_groups(parameters)
    optimizer = torch.optim.AdamW(groups, lr=lr) if make_optimizer is None else make_optimizer(groups)
    if found_lr is not None:
        # Before the schedule is made, which is relative to it.
        for group in optimizer.param_groups:
            group["lr"] = found_lr
    if make_schedule is None:
        return optimizer
    return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": schedule_config(make_schedule(optimizer))})
