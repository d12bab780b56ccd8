"""Products with weights of 8 bits, for generation on a CPU.

A token of a single row is read at the speed at which weights come from memory, and weights of 8 bits are a quarter of those in
float32. Each output has its own scale: the largest weight of a row becomes 127.

The routine for whole numbers rounds the other factor as well, to 127 steps over the range of all rows. With that alone, models
with a few large activations per row become much worse, and a row's result depends on its batch. So each row is divided by its
own largest value, two more values fix the range, and what the first rounding leaves is a second row of the same product. This
gives 13 bits, and a row's sums of whole numbers are the same in any batch.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1e-30
"""Below this, a largest value counts as 0."""
LEAST = 2**19
"""The smallest number of weights. With fewer, what surrounds the product takes longer than to read them."""
STEPS = 63
"""The largest whole number of a rounded activation. With more than 7 bits, AVX2 saturates the sum of two products."""


@functools.cache
def problem() -> str | None:
    """Say why there are no such products here, or None."""
    try:
        with torch.no_grad():
            found = Int8Weights().linear(torch.eye(4), None)(torch.ones(1, 4))
    except (RuntimeError, AttributeError) as error:
        return f"torch {torch.__version__} has no products with them on this processor ({str(error).splitlines()[0]})"
    return None if torch.allclose(found, torch.ones(1, 4), atol=1e-3) else "its products with them are wrong on this processor"


def check(device: torch.device, *, sharded: bool) -> None:
    """Check that weights of 8 bits can be used.

    Raises:
        ValueError: If they cannot.
    """
    where = f"the model is on {device}" if device.type != "cpu" else "the model is sharded" if sharded else None
    reason = where or problem()
    if reason is not None:
        raise ValueError(
            f"`quantization` of GenerationConfig must be null here, but got 'int8'. Its weights are for a CPU, and {reason}. "
            "Remove the setting."
        )


class Int8Weights:
    """The weights of a model in 8 bits. They are kept between blocks of `packed_linears` as long as they do not change."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, int, Any]] = {}

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return an `F.linear` with the weight (V, D) in 8 bits and the bias (V,)."""
        weight = weight.detach()  # which shares its counter of changes
        kept = self._kept.get(weight.data_ptr())
        version = 0 if weight.is_inference() else weight._version
        if kept is None or kept[0].shape != weight.shape or kept[1] != version:
            # The weight is kept so that no other one gets its address.
            kept = self._kept[weight.data_ptr()] = (weight, version, _packed(weight))
        packed, ends = kept[2], torch.zeros(1, weight.shape[1])
        ends[0, 0], ends[0, -1] = STEPS + 0.5, -STEPS - 0.5  # for which the routine rounds to whole numbers

        def linear(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]).float()
            count = len(rows)
            if not count:
                return x.new_empty(*x.shape[:-1], len(weight))
            size = rows.abs().amax(1, keepdim=True).clamp_min_(SMALLEST).div_(STEPS)
            scaled = rows / size
            whole = scaled.round()
            rest = scaled.sub_(whole).mul_(2 * STEPS)
            both = torch.ops.quantized.linear_dynamic(torch.cat([whole, rest, ends]), packed, True)
            y: Tensor = both[:count].add_(both[count:-1], alpha=0.5 / STEPS).mul_(size)
            if bias is not None:
                y = y.add_(bias)
            return y.view(*x.shape[:-1], len(weight)).to(x.dtype)

        return linear


def _packed(weight: Tensor) -> Any:
    """Round a weight to 8 bits, in the layout of the routine."""
    scales = weight.abs().amax(1).float().clamp_min(SMALLEST) / 127
    rounded = (weight / scales[:, None]).round_().to(torch.int8)
    with warnings.catch_warnings():
        # The routine takes the tensors of torch that know their scale. They are deprecated, and it has no other form yet.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
        zeros = torch.zeros(len(weight), dtype=torch.long)
        scaled = torch._make_per_channel_quantized_tensor(rounded, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(scaled, None)
