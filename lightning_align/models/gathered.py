"""Whole weights of a sharded model while it generates, so that a token needs no communication."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_align.models.parallelize import within_forward
from lightning_align.runtime.memory import device_memory
from lightning_align.runtime.ranks import everyone

GATHERED_SHARE = 1 / 3
"""The share of a device's memory that the gathered weights may take. The ranks of a machine share the memory of its CPUs."""
_said: set[str] = set()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather the weights of a sharded model once within a ``with`` block, and free them at its end.

    They have the dtype of a mixed precision. Within the block the model is that of one process: its passes are no collectives,
    so that the ranks may make different numbers of them. If the weights are too large for a device, which is said once, each
    pass gathers one layer at a time as in training.

    Args:
        model: Any model, or several in one. Every rank must call this. One that is not sharded is left alone.
    """
    sharded: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded or not _fit(model, sharded):
        yield
        return
    roots = [module for module in sharded if _outermost(module, sharded) is module]
    layers = [module for module in sharded if module not in roots]
    try:
        for root in roots:
            within_forward(root, lambda: None)  # FSDP2 leaves the outermost weights gathered
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for module in sharded:
            module.reshard()


def _outermost(module: Any, sharded: list[Any]) -> Any:
    """Return the first sharded module that contains another one, or is it."""
    return next(outer for outer in sharded if any(inner is module for inner in outer.modules()))


def _fit(model: nn.Module, sharded: list[Any]) -> bool:
    """Return whether the gathered weights fit the memory of each rank's device. This is a collective."""
    parts = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if not parts:
        return True  # they are gathered already
    policies = (getattr(module, "gather_policy", None) for module in sharded)
    dtype = next((policy.param_dtype for policy in policies if policy is not None), None)
    needed = sum(part.numel() * (dtype or part.dtype).itemsize for part in parts)
    device = parts[0].to_local().device
    limit = GATHERED_SHARE * (device_memory(device) or 0)
    if everyone(needed <= limit, device):
        return True
    message = (
        f"The weights take {needed / 2**30:.1f} GiB when they are gathered, which is more than {GATHERED_SHARE:.0%} of the "
        "memory of a device. So each token gathers one layer at a time, which takes more time. Serve the model with another "
        "engine to generate faster."
    )
    if message not in _said:
        _said.add(message)
        rank_zero_info(message)
    return False
