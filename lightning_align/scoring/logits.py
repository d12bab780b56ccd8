"""Log-probabilities of targets from logits that a model has computed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_align.scoring.head import CHUNK_BYTES, accumulator_dtype


class _LogitsLogProbs(torch.autograd.Function):
    """log softmax of given logits at some positions, without a second (B, N, V) tensor in the forward pass."""

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
            grad_logits = logits_MV.index_select(0, where_T[rows]).to(lses_T.dtype).sub_(lses_T[rows, None]).exp_()
            scale = grad_T[rows, None]
            grad_logits.mul_(-scale).scatter_add_(1, targets_T[rows, None], scale)
            grad_MV[where_T[rows]] = grad_logits.to(grad_MV.dtype)
        return grad_MV, None, None, None


def _zeros_like(x: Tensor) -> Tensor:
    """Zeros to be written in part.

    On a CPU they come from numpy, which leaves a page to the system until it is written and asks for huge pages:
    `torch.zeros_like` would touch them all, at the price of a page fault each.
    """
    if x.device.type != "cpu":
        return torch.zeros_like(x)
    return torch.from_numpy(np.zeros(x.numel() * x.element_size(), np.uint8)).view(x.dtype).view(x.shape)


def logits_logprobs(logits: Tensor, rows: Tensor, before: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target where there are logits and nothing else: the path of any plain module.

    Args:
        logits: (B, N, V).
        rows: (T,) row of each target.
        before: (T,) position of the logit that scores it.
        targets: (T,) int64 token ids.

    Returns:
        (T,) float32, in nats.
    """
    chunk = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    flat = rows * logits.shape[1] + before
    logps: Tensor = _LogitsLogProbs.apply(logits.flatten(0, 1), flat, targets, chunk)  # type: ignore[no-untyped-call]
    return logps
