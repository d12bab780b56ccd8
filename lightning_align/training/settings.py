"""The settings of a run that matter when runs are compared, flat: at most ten, for TensorBoard's tab HPARAMS."""

import math
from typing import Any

from lightning_align.runtime.lightning_internals import datamodule_of
from lightning_align.runtime.ranks import data_world

OF_METHODS = ("loss", "beta", "reference", "opponent", "num_connections", "num_neighbors")
"""Arguments of the methods that are shown, where a module has them."""


def run_settings(module: Any) -> dict[str, bool | int | float | str]:
    """Return the settings of a run that has begun: the model, the optimizer, the data and the method.

    The complete settings are in ``config.yaml`` and ``hparams.yaml`` in the folder of the run.

    Args:
        module: The module, whose Trainer has made the optimizer.

    Returns:
        `model`, `lora_rank`, `optimizer`, `lr`, `batch_size` (rows per optimizer step on all ranks), `max_length`, `steps`, and
        what the method has of `OF_METHODS`. What a run does not have is left out.
    """
    trainer, data = module.trainer, datamodule_of(module.trainer)
    config = getattr(module.policy, "config", None)
    found: dict[str, Any] = {
        "model": getattr(config, "_name_or_path", None) or type(module.policy).__name__,
        "lora_rank": None if module.lora is None else module.lora.rank,
    }
    if trainer.optimizers:
        optimizer = trainer.optimizers[0]
        group = optimizer.param_groups[0]
        # A schedule changes the rate before the first step.
        found |= {"optimizer": type(optimizer).__name__, "lr": group.get("initial_lr", group["lr"])}
    rows = getattr(data, "batch_size", None)
    if isinstance(rows, int):
        found["batch_size"] = rows * trainer.accumulate_grad_batches * data_world()[1]
    found["max_length"] = getattr(data, "max_length", None)
    steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    found["steps"] = int(steps) if math.isfinite(steps) and steps > 0 else None
    found |= {name: module.hparams.get(name) for name in OF_METHODS}
    return {name: _shown(value) for name, value in found.items() if value is not None}


def _shown(value: Any) -> bool | int | float | str:
    if isinstance(value, dict):  # a weighted sum of losses
        return " + ".join(f"{weight} {name}" for name, weight in value.items())
    return value if isinstance(value, (bool, int, float)) else str(value)
