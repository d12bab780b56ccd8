"""One gradient per optimizer batch: the mean over its tokens or pairs, however the batch is split."""

import math
from collections.abc import Callable, Sequence

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

INITIAL_SCALE = 2.0**10
"""The first loss scale of 16-mixed for a mean. GradScaler starts with 2^16, where float16 gradients often overflow."""


def lower_scale(scaler: torch.amp.GradScaler, count: float) -> None:
    """Lower the scale of a gradient scaler that has not taken a step, for a loss that is a sum.

    The gradient of a sum over T tokens is T times that of their mean. GradScaler would skip about log2(T) steps until it fits
    into float16. The new scale is a power of two, so the gradient is not rounded by it. GradScaler raises it in the course of
    the run, and it is saved in checkpoints.

    Args:
        scaler: A scaler. A lower scale is kept.
        count: The number of tokens or pairs in the sum.
    """
    state = scaler.state_dict()
    if state:
        scale = INITIAL_SCALE / 2.0 ** math.ceil(math.log2(max(count, 1.0)))
        scaler.load_state_dict({**state, "scale": min(float(state["scale"]), scale)})


class BatchMean:
    """Turns the gradient of a sum into the gradient of the mean over the optimizer batch.

    Each training step returns a sum over tokens or pairs and adds their number here. The gradients are divided once, before
    the optimizer step, by the total over all micro-batches and ranks.
    """

    def __init__(self) -> None:
        """Start with an empty optimizer batch."""
        self.count: Tensor | float = 0.0

    def add(self, count: Tensor | int) -> None:
        """Count the tokens or pairs of a micro-batch."""
        self.count = self.count + count

    def reset(self) -> None:
        """Start a new optimizer batch."""
        self.count = 0.0

    def average(
        self,
        gradients: Sequence[Tensor],
        *,
        accumulated: int,
        world_size: int,
        total: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """Divide the gradients by the total count, in place, and start a new optimizer batch.

        Args:
            gradients: Of every trained parameter. Lightning has divided them by the number of micro-batches, and DDP or FSDP2
                by the number of ranks.
            accumulated: The number of micro-batches.
            world_size: The number of ranks.
            total: Sums a scalar over the ranks; called only if there are several.
            device: Where the gradients are.
        """
        # Filling a tensor does not make the host wait for a GPU. Copying a number to it does.
        known = self.count if isinstance(self.count, Tensor) else torch.full((), self.count, dtype=torch.float32, device=device)
        count = known.to(device, torch.float32)
        self.reset()
        if world_size > 1:
            count = total(count)
        if gradients:
            torch._foreach_mul_(list(gradients), accumulated * world_size / count.clamp(min=1))


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of an optimizer's parameters, without those that have none."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, a scalar; also of sharded ones."""
    norm = torch.nn.utils.get_total_norm(list(gradients))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(module: L.LightningModule, optimizer: Optimizer, value: int | float | None, algorithm: str | None) -> None:
    """Clip gradients, also for a fused optimizer in bfloat16.

    Lightning refuses to clip for every fused optimizer in mixed precision. In bfloat16 no gradient is scaled, so clipping is
    right there.

    Args:
        module: Attached to a Trainer.
        optimizer: Its gradients are clipped in place.
        value: The largest norm or value; None or 0 does not clip.
        algorithm: ``norm`` or ``value``.

    Raises:
        ValueError: If a fused optimizer is to unscale float16 gradients after the clipping.
    """
    precision = module.trainer.precision_plugin
    if not isinstance(precision, MixedPrecision) or not getattr(optimizer, "_step_supports_amp_scaling", False):
        module.clip_gradients(optimizer, value, algorithm)
    elif precision.scaler is not None and value:
        raise ValueError(
            f"gradient_clip_val is {value}, but with precision 16-mixed a fused optimizer unscales gradients only after they "
            "are clipped. Set `fused: false` in the optimizer's init_args, or use precision bf16-mixed."
        )
    else:
        Precision.clip_gradients(precision, optimizer, value or 0.0, GradClipAlgorithmType(algorithm or "norm"))
