"""Float32 copies of trained weights that have fewer bits, as with ``precision: bf16-true``.

A bfloat16 weight has 8 significant bits. An update below 1/512 of the weight is lost to rounding, and the default updates of
preference tuning (5e-6) are far below that for nearly all weights. So the optimizer gets float32 copies, the master weights:

- After each backward pass the gradients are moved to the copies and added there, in float32.
- After each optimizer step the weights of the model become the rounded copies.
- A checkpoint holds the copies in place of the rounded weights, so a resumed run continues exactly.

This works with any optimizer, is deterministic, and needs no optimizer of its own, unlike stochastic rounding. It costs memory:
with AdamW 18 bytes per trained weight and 2 per frozen weight. The purpose of ``bf16-true`` is thus speed, smaller activations,
and frozen weights in 2 bytes (LoRA, CALM, references).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

SAMPLE = 10_000
"""The number of weights of each parameter that are compared with the learning rate."""


def is_narrow(parameter: Tensor) -> bool:
    """Return whether a tensor has fewer bits than float32."""
    return parameter.is_floating_point() and parameter.dtype.itemsize < 4


class MasterWeights:
    """The master weights of the narrow parameters of one optimizer. It is empty if there are none."""

    def __init__(self) -> None:
        """Start without parameters."""
        self.of: dict[nn.Parameter, nn.Parameter] = {}
        """The parameters of the model, each with its float32 copy."""
        self._restored: dict[str, Tensor] = {}

    def create(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Make the copies of the narrow parameters that train. Earlier copies are dropped.

        A copy starts as the weight of the last loaded checkpoint where the parameter still is that weight, rounded.

        Args:
            parameters: All parameters by name.
        """
        self.of = {}
        for name, parameter in parameters:
            if parameter.requires_grad and is_narrow(parameter):
                parameter.grad = None  # an earlier fit may have been stopped in the middle of an optimizer batch
                self.of[parameter] = nn.Parameter(self._start(name, parameter))
        self._restored = {}

    def _start(self, name: str, parameter: nn.Parameter) -> Tensor:
        stored = self._restored.get(name)
        if stored is None or stored.shape != parameter.shape:
            return parameter.detach().float()
        return _where_rounded(stored.to(parameter.device, torch.float32), parameter.detach())

    def substitute(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return parameters with the copies in place of those that have one."""
        return [self.of.get(parameter, parameter) for parameter in parameters]

    def attach(self, optimizer: Optimizer) -> None:
        """Write the copies to the model after each step of an optimizer, before its other hooks."""
        if self.of:
            optimizer.register_step_post_hook(lambda *_: self.write())

    @torch.no_grad()
    def collect(self) -> None:
        """Move the gradients of the model to the copies, and add them to those that are there, in float32."""
        for parameter, master in self.of.items():
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(master.dtype)
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def prepare_step(self) -> None:
        """Move the gradients to the copies. Set the copies to the weights that were changed since the last step.

        Callbacks may change the weights of the model, as self-play does when it resumes between two iterations.
        """
        self.collect()
        for parameter, master in self.of.items():
            master.copy_(_where_rounded(master, parameter))

    @torch.no_grad()
    def write(self) -> None:
        """Set the weights of the model to the rounded copies."""
        for parameter, master in self.of.items():
            parameter.copy_(master)

    # -- checkpoints

    def save(self, state: dict[str, Any], parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Put the copies in the place of the rounded weights in a state dict.

        Args:
            state: The state dict of the module, changed in place.
            parameters: The parameters of the module by their names in the state dict.
        """
        for name, parameter in parameters:
            master = self.of.get(parameter)
            if master is not None and name in state:
                state[name] = master.detach()

    def load(self, state: Mapping[str, Any]) -> None:
        """Remember the wide weights of a checkpoint for `create`.

        Args:
            state: The state dict of the checkpoint.
        """
        self._restored = {
            name: value
            for name, value in state.items()
            if isinstance(value, Tensor) and value.is_floating_point() and not is_narrow(value)
        }


def _where_rounded(wide: Tensor, narrow: Tensor) -> Tensor:
    """Return the wide numbers where the narrow ones are these numbers rounded, and the narrow ones elsewhere."""
    return torch.where(wide.to(narrow.dtype) == narrow, wide, narrow.to(wide.dtype))


def share_lost(optimizer: Optimizer) -> float:
    """Estimate the share of an optimizer's weights that an update of the size of the learning rate would not change.

    AdamW updates a weight by about the learning rate. A narrow weight does not change if this is less than half of the distance
    to the next number of its dtype. The learning rate is the one before any schedule.
    """
    lost = total = 0
    for group in optimizer.param_groups:
        lr = float(group.get("initial_lr", group.get("lr", 0.0)))
        for parameter in group["params"]:
            local: Any = parameter.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            sample = local.flatten()[:: max(1, local.numel() // SAMPLE)]
            total += len(sample)
            if is_narrow(parameter):
                exponent = torch.frexp(sample.float()).exponent - 1  # |w| is from 2^e to below 2^(e + 1)
                half = torch.finfo(parameter.dtype).eps / 2 * torch.exp2(exponent.float())
                lost += int(((half > lr) & (sample != 0)).sum())
    return lost / max(total, 1)


def warn_of_lost_updates(optimizers: Iterable[Optimizer], *, sharded: bool) -> None:
    """Warn if most weights of an optimizer are too coarse for its learning rate.

    Optimizers of `AlignModule.configure_optimizers` have float32 weights. This is about sharded weights, and about optimizers
    that a subclass makes by itself.

    Args:
        optimizers: The optimizers of the run.
        sharded: Whether the weights are sharded.
    """
    for optimizer in optimizers:
        share = share_lost(optimizer)
        if share > 0.5:
            remedy = (
                "Use precision bf16-mixed: under FSDP2 it computes in bfloat16 and keeps float32 weights for the optimizer"
                if sharded
                else "Make the optimizer with the argument `optimizer` instead of `configure_optimizers`, which keeps float32 "
                "weights for it, or use precision bf16-mixed"
            )
            rank_zero_warn(
                f"The learning rate is below the resolution of {share:.0%} of the weights, which have 16 bits and are updated "
                f"directly. Most updates will be lost. {remedy}, or raise the learning rate."
            )
