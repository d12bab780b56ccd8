"""Matrix products of 16-bit numbers that are summed and returned in float32.

A product of two bfloat16 matrices is rounded to bfloat16 by default. At a logit of 16 this is an error of up to 1/32, in nats.
Here the inputs may have 16 bits, but the sums and the result have at least float32:

- On a device whose ``torch.mm`` takes ``out_dtype`` (CUDA with torch 2.8 or later), the product reads 16 bits and writes
  float32.
- Elsewhere the factors are converted to float32. A product of two 16-bit numbers is exact there. Callers pass tiles, so no
  large matrix is converted as a whole.
- On a CPU with instructions for bfloat16, which are twice as fast and more, the products of the backward pass alone are rounded
  to bfloat16, tile by tile. The gradients are then off by less than 1/256 of their norm, as those of the other layers.
"""

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


_wide: dict[tuple[str, torch.dtype], bool] = {}
"""What `has_wide_products` has found out."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_wide_products(device: str, dtype: torch.dtype) -> bool:
    """Return whether a device multiplies matrices of a 16-bit dtype to a float32 result. Finds out by one small product.

    Args:
        device: The type of the device, such as ``cuda``.
        dtype: The dtype of both factors.
    """
    if device == "cpu" or dtype.itemsize > 2:
        return False
    if (device, dtype) not in _wide:
        try:
            factor = torch.zeros(16, 16, device=device, dtype=dtype)
            _wide[device, dtype] = torch.mm(factor, factor, out_dtype=torch.float32).dtype is torch.float32
        except (NotImplementedError, RuntimeError, TypeError):
            _wide[device, dtype] = False
    return _wide[device, dtype]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def rounds_gradients(device: str, dtype: torch.dtype) -> bool:
    """Return whether `add_product` adds products that are rounded to a dtype, because the device is much faster with it."""
    return device == "cpu" and dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def factor_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of the factors of `add_product`: that of ``like`` if its device multiplies it well, else float32."""
    kind = like.device.type, like.dtype
    return like.dtype if has_wide_products(*kind) or rounds_gradients(*kind) else accumulator_dtype(like.dtype)


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Compute a @ b in at least float32.

    Args:
        a: (N, K) factor.
        b: (K, M) factor of the same dtype.
        out: (N, M) memory for the result, if the factors are wide or must be converted. Otherwise it is not used.
    """
    dtype = accumulator_dtype(a.dtype)
    if a.dtype is dtype:
        return torch.mm(a, b, out=out)
    if has_wide_products(a.device.type, a.dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b in place.

    Args:
        into: (N, M) sums in at least float32.
        a: (N, K) factor.
        b: (K, M) factor. The product reads both in the dtype that `factor_dtype` returns for it.
    """
    dtype = factor_dtype(b)
    if dtype is into.dtype:
        into.addmm_(a.to(dtype), b.to(dtype))
    elif has_wide_products(b.device.type, dtype):
        into += torch.mm(a.to(dtype), b, out_dtype=into.dtype)
    else:
        into += torch.mm(a.to(dtype), b)
