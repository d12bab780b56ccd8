"""Attention kernels of torch, in the dtype in which they are fast."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def in_float32(q: Tensor) -> bool:
    """Return whether attention is computed in float32, although the products of the model are in 16 bits.

    So it is on CPUs for more than one query. There torch's kernel is slower in 16 bits: on one that multiplies bfloat16 by AMX,
    forward and backward pass took 3.3 times as long as in float32, and the forward pass alone 1.8 times.

    Args:
        q: (..., N, K) queries.
    """
    if q.device.type != "cpu" or q.shape[-2] == 1:
        return False
    return q.dtype in (torch.bfloat16, torch.float16) or (q.dtype is torch.float32 and torch.is_autocast_enabled("cpu"))


def attend_in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attend: Any) -> Tensor:
    """Call attention in float32, outside of autocast, and return its output in the dtype that it would have had.

    The inputs are rounded as autocast would, so that what a 16-bit cache holds makes no difference.

    Args:
        q: (..., N, K) queries.
        k: (..., M, K) keys.
        v: (..., M, K) values.
        mask: A mask of bool, or one of any other dtype that is added, or None.
        attend: Computes the output from queries, keys, values and mask.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.to(dtype).float() for x in (q, k, v))
        out: Tensor = attend(q, k, v, mask)
    return out.to(dtype)


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, on a CPU in float32 where 16 bits would be slower.

    Args:
        q: (..., N, K) queries.
        k: (..., M, K) keys.
        v: (..., M, K) values.
        attn_mask: A mask of bool, or one that is added.
        options: The other arguments of the function.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    return attend_in_float32(q, k, v, attn_mask, attend) if in_float32(q) else attend(q, k, v, attn_mask)
