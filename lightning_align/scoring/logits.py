"""Log-probs of targets from the logits of a model."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_align.runtime.untraced import untraced
from lightning_align.scoring.head import CHUNK_BYTES, DEVICE_BYTES, exp_without_tiny_
from lightning_align.scoring.products import accumulator_dtype


class _LogitsLogProbs(torch.autograd.Function):
    """log softmax of given logits at selected positions. The forward pass allocates no second (B, N, V) tensor."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, where_T: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        total = where_T.shape[0]
        logps_T = logits_MV.new_empty(total, dtype=accumulator_dtype(logits_MV.dtype))
        lses_T = torch.empty_like(logps_T)
        for start in range(0, total, chunk):
            rows = slice(start, start + chunk)
            logits = logits_MV.index_select(0, where_T[rows]).to(lses_T.dtype)
            lses_T[rows] = logits.logsumexp(dim=1)
            logps_T[rows] = logits.gather(1, targets_T[rows, None]).squeeze(1) - lses_T[rows]
        ctx.save_for_backward(logits_MV, where_T, targets_T, lses_T)
        ctx.chunk = chunk
        return logps_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_MV, where_T, targets_T, lses_T = ctx.saved_tensors
        grad_MV = _zeros_like(logits_MV)
        for start in range(0, where_T.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad_logits = logits_MV.index_select(0, where_T[rows]).to(lses_T.dtype).sub_(lses_T[rows, None])
            exp_without_tiny_(grad_logits)
            scale = grad_T[rows, None]
            grad_logits.mul_(-scale).scatter_add_(1, targets_T[rows, None], scale)
            grad_MV[where_T[rows]] = grad_logits.to(grad_MV.dtype)
        return grad_MV, None, None, None


def _zeros_like(x: Tensor) -> Tensor:
    """Return zeros of which only a part will be written.

    On a CPU they come from numpy, which asks for huge pages and does not touch a page before it is written.
    `torch.zeros_like` would touch all pages, at the cost of a page fault each.
    """
    if x.device.type != "cpu":
        return torch.zeros_like(x)
    return torch.from_numpy(np.zeros(x.numel() * x.element_size(), np.uint8)).view(x.dtype).view(x.shape)


@untraced  # as `head_logprobs`
def logits_logprobs(logits: Tensor, rows: Tensor, before: Tensor, targets: Tensor) -> Tensor:
    """Compute the log-prob of each target from logits, for models that have no hidden states and head.

    Args:
        logits: (B, N, V) logits.
        rows: (T,) row of each target.
        before: (T,) position of the logits that score the target.
        targets: (T,) int64 token ids.

    Returns:
        (T,) log-probs in nats, at least float32.
    """
    size = CHUNK_BYTES if logits.device.type == "cpu" else DEVICE_BYTES
    chunk = max(1, size // (4 * logits.shape[-1]))
    flat = rows * logits.shape[1] + before
    logps: Tensor = _LogitsLogProbs.apply(logits.flatten(0, 1), flat, targets, chunk)  # type: ignore[no-untyped-call]
    return logps
