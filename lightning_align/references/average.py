"""A weighted average of model weights."""

import copy
from collections.abc import Callable

import torch
from ema_pytorch import EMA
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_align.models.deferred import recipes_kept


class Average(nn.Module):
    """Weights in at least float32 that move towards other weights. In bfloat16 a step of 0.1 % would be lost to rounding.

    They keep their dtype when the module around them is converted, as with ``precision: bf16-true``, and are not trained.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start with the weights of a model.

        Args:
            model: Used as it is, and frozen, if it is in float32 or float64. Otherwise copied.
        """
        super().__init__()
        narrow = [p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
        with recipes_kept(model) as made:
            self.model = (copy.deepcopy(model).float() if narrow else model).requires_grad_(False)
            made.append(self.model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def widest(tensor: Tensor) -> Tensor:
            to = fn(tensor)
            return tensor.to(to.device, torch.promote_types(tensor.dtype, to.dtype))

        super()._apply(widest, recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def follow(self, model: nn.Module, *, alpha: float) -> None:
        """Move towards the weights of another model: q <- alpha p + (1 - alpha) q.

        Args:
            model: A model with the same names and shapes.
            alpha: The share of the way, above 0 and at most 1.

        Raises:
            ValueError: If ``alpha`` is out of range, or the models differ in names or shapes. A weight without a counterpart
                would never move.
        """
        if not 0 < alpha <= 1:
            raise ValueError(f"`alpha` must be above 0 and at most 1, but got {alpha}: the share of the way to the policy.")
        reshard(self.model, model)
        own, theirs = weights_of(self.model), weights_of(model)
        if [(name, value.shape) for name, value in own] != [(name, value.shape) for name, value in theirs]:
            has, lacks = ({f"{name} {tuple(value.shape)}" for name, value in side} for side in (own, theirs))
            raise ValueError(
                f"The reference cannot follow the policy. Only the policy has {_some(lacks - has)}, and only the reference has "
                f"{_some(has - lacks)}. Rename or add layers before the module is configured, and compile with "
                "`model.compile()`, which keeps the names."
            )
        # A new object each time, because it cannot be copied or pickled. Only one of its steps is used: its `update` would copy
        # the policy in its first 100 calls, whatever `beta` is.
        ema = EMA(model, ema_model=self.model, beta=1 - alpha, include_online_model=False, coerce_dtype=True, use_foreach=True)
        ema.update_moving_average(self.model, model, 1 - alpha)
        for (_, mine), (_, other) in zip(own, theirs, strict=True):
            if not mine.is_floating_point():
                mine.copy_(other)


def weights_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a model, by name."""
    return [*model.named_parameters(), *model.named_buffers()]


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + f" and {len(names) - 3} more" * (len(names) > 3) or "nothing"


def reshard(*models: nn.Module) -> None:
    """Reshard sharded models. FSDP2 keeps the root's weights gathered after a forward pass."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all weights into the target, in its dtype."""
    if source is target:
        return
    reshard(source, target)
    for (_, mine), (_, other) in zip(weights_of(target), weights_of(source), strict=True):
        mine.copy_(other)
