"""Linear layers with weights packed for oneDNN, for decoding steps with a few rows on a CPU.

The speed of a matrix product with few rows is limited by how fast its weights are read from memory. The general routine is
made for many rows and is two to four times slower than this limit. Packing copies the weights, so it is done once for many
steps. It is not done for a single row, because a product of one row with a matrix is faster with the plain weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.generation import int8
from lightning_align.models.lora import LoRALinear

# The smallest number of weights to pack. Smaller matrices stay in the CPU cache, where the general routine is as fast.
LEAST = 2**15

NAMES: dict[type[nn.Module], str] = {nn.Linear: "forward", LoRALinear: "apply_weight"}
"""The methods that are a linear layer without adapters."""

_few_columns = False
_int8: int8.Int8Weights | None = None


def pack(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """Build an `F.linear` that packs its weight when it is first useful.

    Args:
        weight: The weight, (V, D). It must not change from now on.
        bias: The bias, (V,), or None.

    Returns:
        The function, or None if packing is not possible or brings no speed.
    """
    usable = weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)
    if _int8 is not None and usable and weight.numel() >= int8.LEAST:
        return _int8.linear(weight, bias)
    if (
        not (usable and _packs(weight.dtype))
        or weight.numel() < LEAST
        or not torch._C._has_mkldnn
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    plain, packed = weight.detach(), None

    def linear(x: Tensor) -> Tensor:
        nonlocal packed
        if x.dtype is not weight.dtype:
            return F.linear(x, weight, bias)
        rows = x.numel() // x.shape[-1]
        # A decoding step appends one column. More columns are a prompt, which is read only once, or guesses.
        step = rows > 1 and (x.ndim == 2 or x.shape[-2] == 1 or _few_columns)
        if step and packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(plain)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed if step else plain, bias, "none", [], "")
        return product

    return linear


@contextmanager
def few_columns() -> Iterator[None]:
    """Pack weights in a `with` block also for several columns of a row, because many such passes follow."""
    global _few_columns
    _few_columns = True
    try:
        yield
    finally:
        _few_columns = False


def _packs(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or (dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@contextmanager
def packed_linears(model: nn.Module, weights: int8.Int8Weights | None = None) -> Iterator[None]:
    """Use packed weights in every plain linear layer inside a `with` block. The weights must not change in the block.

    Args:
        model: The model.
        weights: Where weights of 8 bits are kept from block to block, to use these.
    """
    global _int8
    outer, _int8 = _int8, weights
    changed: list[tuple[nn.Module, str]] = []
    try:
        for module in model.modules():
            # Skip subclasses and instances with a replaced forward, because they may compute something else.
            name = NAMES.get(type(module))
            if name is not None and name not in vars(module):
                linear = pack(module.weight, module.bias)  # type: ignore[arg-type]
                if linear is not None:
                    setattr(module, name, linear)
                    changed.append((module, name))
        yield
    finally:
        _int8 = outer
        for module, name in changed:
            delattr(module, name)
