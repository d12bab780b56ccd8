"""Evaluation mode for a while, with the mode of each submodule restored afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[dict[nn.Module, bool]]:
    """Set evaluation mode within a ``with`` block, then restore the mode of each submodule.

    Each submodule gets its own mode back, because some may be frozen in evaluation mode. Gradients are disabled with `no_grad`
    and not with inference mode, because tensors that a model keeps from inference mode cannot be used in training.

    Args:
        model: Any module.
        gradients: Whether to leave gradients as they are. By default they are disabled.

    Yields:
        The mode of each submodule before the block, true for training.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with nullcontext() if gradients else torch.no_grad():
            yield modes
    finally:
        for module, training in modes.items():
            module.training = training
