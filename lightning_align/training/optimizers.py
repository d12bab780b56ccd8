"""The optimizer of a run: parameter groups, and how Lightning steps a schedule."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
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


def on_cuda(groups: Iterable[dict[str, Any]]) -> bool:
    """Return whether there are parameters and all of them are on CUDA devices."""
    places = {parameter.device.type for group in groups for parameter in group["params"]}
    return places == {"cuda"}


def default_optimizer(groups: list[dict[str, Any]], *, lr: float, scaled: bool = False) -> Optimizer:
    """Make AdamW, fused on CUDA devices: one kernel per step instead of several per group of tensors.

    Args:
        groups: The parameter groups.
        lr: The learning rate.
        scaled: Whether a gradient scaler unscales the gradients. A fused optimizer would do it itself, after they are clipped.
    """
    fused = on_cuda(groups) and not scaled
    return torch.optim.AdamW(groups, lr=lr, fused=True) if fused else torch.optim.AdamW(groups, lr=lr)


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    make_optimizer: OptimizerCallable | None,
    make_schedule: LRSchedulerCallable | None,
    *,
    lr: float,
    found_lr: float | None = None,
    scaled: bool = False,
    ready: Callable[[Optimizer], None] = lambda optimizer: None,
) -> OptimizerLRScheduler:
    """Make the optimizer of the parameters that train, and the schedule.

    Args:
        parameters: All parameters.
        make_optimizer: A factory that gets the parameter groups. None makes AdamW.
        make_schedule: A factory that gets the optimizer. None makes no schedule.
        lr: The learning rate of AdamW.
        found_lr: A learning rate that replaces the one of the factory, in all groups.
        scaled: See `default_optimizer`.
        ready: Called with the optimizer before the schedule is made.
    """
    groups = parameter_groups(parameters)
    optimizer = default_optimizer(groups, lr=lr, scaled=scaled) if make_optimizer is None else make_optimizer(groups)
    if found_lr is not None:
        # Before the schedule is made, which is relative to it.
        for group in optimizer.param_groups:
            group["lr"] = found_lr
    ready(optimizer)
    if make_schedule is None:
        return optimizer
    return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": schedule_config(make_schedule(optimizer))})
