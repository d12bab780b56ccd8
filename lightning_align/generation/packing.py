"""Weights in the layout that oneDNN multiplies fastest with, for the few rows of a decoding step on a CPU.

A matrix product with a handful of rows is as fast as its weights come from memory, which the general routine, made for
many rows, is two to four times short of. Packing is a copy of the weights, so it is done once for many steps, and not at all
for a single row: a row by a matrix is faster from the weights as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Smaller weights stay in the cache, where the general routine is as fast.
LEAST = 2**15


def pack(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """`F.linear` with a weight that is packed when it is first of use, or None where it is of none or not possible.

    Args:
        weight: (V, D), which must not change from now on.
        bias: (V,) or None.
    """
    usable = weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter) and _packs(weight.dtype)
    if not usable or weight.numel() < LEAST or not torch._C._has_mkldnn or torch.is_autocast_enabled("cpu"):
        return None
    plain, packed = weight.detach(), None

    def linear(x: Tensor) -> Tensor:
        nonlocal packed
        if x.dtype is not weight.dtype:
            return F.linear(x, weight, bias)
        rows = x.numel() // x.shape[-1]
        # A step appends one column; what appends more is the prompt, read once.
        step = rows > 1 and (x.ndim == 2 or x.shape[-2] == 1)
        if step and packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(plain)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed if step else plain, bias, "none", [], "")
        return product

    return linear


def _packs(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or (dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Let every plain linear layer multiply with packed weights for the length of a block. The weights must not change."""
    changed = []
    try:
        for module in model.modules():
            # Not subclasses, whose forward is their own, and not what someone has given a forward of its own.
            if type(module) is nn.Linear and "forward" not in vars(module):
                linear = pack(module.weight, module.bias)
                if linear is not None:
                    module.forward = linear  # type: ignore[method-assign,assignment]
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
