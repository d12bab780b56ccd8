"""Weights that mixed precision casts once per generation, and not once per token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_align.models.attention import attention_dtype
from lightning_align.models.language_model import Head, HiddenModel
from lightning_align.runtime.ranks import is_sharded

_cleared = 0


def num_cleared() -> int:
    """Return how often `casts_kept` has freed the casts that autocast kept."""
    return _cleared


@contextmanager
def casts_kept(model: nn.Module) -> Iterator[None]:
    """Let autocast keep its casts of all float32 weights within a block without gradients, and free them at its end.

    Autocast casts a weight for each product. It keeps the cast only of a weight that trains, so that a frozen model would be
    cast whole for each token. The casts are those of autocast itself, so that the results do not change.

    Args:
        model: The model. Within the block its frozen weights say that they train.
    """
    frozen = [
        parameter
        for parameter in model.parameters()
        if not parameter.requires_grad
        and type(parameter) is nn.Parameter  # not a part of a sharded weight
        and parameter.dtype is torch.float32
        and not parameter.is_inference()
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        global _cleared
        _cleared += 1
        for parameter in frozen:
            parameter.requires_grad_(False)
        weight = next(model.parameters(), None)
        if weight is not None and torch.is_autocast_enabled(weight.device.type):
            torch.clear_autocast_cache()


def fixed_head(model: HiddenModel) -> Head | None:
    """Return the output layer for many steps, in the dtype of its products.

    A head may be a property that computes its weight each time, such as that of a mixture of two models.

    Args:
        model: The model, whose weights do not change during these steps.

    Returns:
        The head, or None for a sharded model, whose weights are gathered only while it runs.
    """
    if is_sharded(model):
        return None
    head = model.head
    dtype = attention_dtype(head.weight)
    return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
