"""Log-probs of targets from hidden states and the weights of the output layer.

The logits at position t score the token at t + 1, so the hidden state that predicts the target at t is at t - 1. Only these
hidden states go through the output layer, in float32, one tile of rows and vocabulary at a time. The logits of prompts and
padding are never computed, and a large (T, V) matrix of logits is never stored.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_align.models.language_model import Head
from lightning_align.runtime.untraced import untraced
from lightning_align.scoring.products import accumulator_dtype, add_product, factor_dtype, has_wide_products, product

# Size of a tile of float32 logits. It is large enough for matrix products to run at full speed, and small enough to stay in
# the last-level cache between two passes over it. Tiles are about square: a tile of few rows would read the weight and its
# gradient from memory again for every few rows.
CHUNK_BYTES = 16 * 2**20
TILE_ROWS = 2048
# The same on other devices, where a tile is about ten launches of kernels, and no cache is as large as the logits. Tiles are
# square there too, because each block of rows reads and adds to the gradient of the whole weight.
DEVICE_BYTES = 256 * 2**20
DEVICE_ROWS = 8192
# Probabilities of up to this many bytes are kept for the backward pass. Larger ones are computed again there.
KEEP_BYTES = 256 * 2**20
# Probabilities below these are 0: e to this power of those relative to the largest of a tile, and the tile's share of the row.
# Trained models are sure of most tokens, so that exp returns subnormal numbers for many others, and products with these are
# up to 40 times slower on processors of Intel. A product of the two bounds is a normal float32. The sum of what a row leaves
# out is below 1e-13 times the vocabulary, where float32 rounds a sum of 1 by 6e-8. Log-probs do not change.
TINY_POWER = -46.0
TINY_SHARE = 1e-13


class _HeadLogProbs(torch.autograd.Function):
    """log softmax(hidden W' + b) at the targets. Keeps no more than `KEEP_BYTES` of probabilities, and no logits.

    With P the probabilities and g the incoming gradient, d logp / d logits = onehot - P. The gradients are therefore
    -g (P - onehot) W for the hidden states and (P - onehot)' (-g hidden) for the weight. The factor g scales only matrices of
    width D, so no pass over a tile of logits is spent on it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        tile: tuple[int, int],
        keep: bool,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        # The casts are in here, so that the gradients are rounded to the dtypes of hidden states and weight, not to this one.
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        total, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        target_logits_T = hidden_TD.new_zeros(total, dtype=accumulator_dtype(hidden_TD.dtype))
        # The log-sum-exp of each row over each block of the vocabulary.
        parts = target_logits_T.new_empty(-(-vocabulary // tile[1]), total)
        kept = []
        buffer = None if keep else _buffer(hidden_TD, tile)
        for rows, columns in tiles(total, vocabulary, tile):
            bias = None if bias_V is None else bias_V[columns]
            logits = tile_logits(hidden_TD[rows], weight_VD[columns], bias, buffer, softcap)
            index, inside = _inside(targets_T[rows], columns)
            target_logits_T[rows] += logits.gather(1, index).squeeze(1).where(inside, 0)
            # If all logits of a block are -inf (masked out), its maximum is too, and -inf - -inf would be NaN.
            maxima = logits.amax(dim=1).clamp_(min=torch.finfo(logits.dtype).min)
            # In place: from here on the tile holds exp(logit - max). The backward pass scales it to probabilities.
            sums = exp_without_tiny_(logits.sub_(maxima[:, None])).sum(dim=1)
            parts[columns.start // tile[1], rows] = maxima + sums.log()
            if keep:
                kept.append((logits, maxima))
        lses_T = parts.logsumexp(dim=0)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, lses_T)
        ctx.kept, ctx.tile, ctx.softcap = kept, tile, softcap
        return target_logits_T - lses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_T.device.type, enabled=False):
            return _HeadLogProbs._gradients(ctx, grad_T)

    @staticmethod
    def _gradients(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, targets_T, lses_T = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        grad_hidden = torch.zeros_like(hidden_TD, dtype=lses_T.dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=lses_T.dtype) if needs_weight else None
        grad_bias = lses_T.new_zeros(vocabulary) if needs_bias else None
        scale_T = -grad_T
        factors = factor_dtype(hidden_TD)
        scaled_TD = (hidden_TD * scale_T[:, None]).to(factors)
        # The kept tiles are overwritten below, so a second backward pass (retain_graph) computes them again.
        kept, ctx.kept = ctx.kept[::-1], []
        buffer = None if kept else _buffer(hidden_TD, ctx.tile)
        for rows, columns in tiles(total, vocabulary, ctx.tile):
            slope = None
            if kept:
                grad, maxima = kept.pop()
                share = (maxima - lses_T[rows]).exp_()
                if slow_if_tiny(grad):
                    torch.threshold_(share, TINY_SHARE, 0.0)
                grad.mul_(share[:, None])
            else:
                bias = None if bias_V is None else bias_V[columns]
                grad = tile_logits(hidden_TD[rows], weight_VD[columns], bias, buffer, ctx.softcap)
                if ctx.softcap is not None:
                    slope = (grad / ctx.softcap).square_().neg_().add_(1)
                exp_without_tiny_(grad.sub_(lses_T[rows, None]))
            index, inside = _inside(targets_T[rows], columns)
            grad.scatter_add_(1, index, -inside[:, None].to(grad.dtype))
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias[columns].addmv_(grad.t(), scale_T[rows])
            grad = grad.to(factors)
            if grad_hidden is not None:
                add_product(grad_hidden[rows], grad, weight_VD[columns])
            if grad_weight is not None:
                add_product(grad_weight[columns], grad.t(), scaled_TD[rows])
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale_T[:, None]).to(ctx.dtypes[0]),
            None if grad_weight is None else grad_weight.to(ctx.dtypes[1]),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
            *(None,) * 5,
        )


def slow_if_tiny(x: Tensor) -> bool:
    """Return whether subnormal numbers occur in this dtype and are slow. On other devices they are not."""
    return x.device.type == "cpu" and x.dtype is torch.float32


def exp_without_tiny_(powers: Tensor) -> Tensor:
    """Compute exp in place. In float32 on a CPU it is 0 for powers of up to `TINY_POWER`."""
    if slow_if_tiny(powers):
        torch.threshold_(powers, TINY_POWER, -math.inf)
    return powers.exp_()


def tiles(total: int, vocabulary: int, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles of a (total, vocabulary) matrix. Rows vary fastest, so a block of the weight stays in the cache."""
    for column in range(0, vocabulary, tile[1]):
        for row in range(0, total, tile[0]):
            yield slice(row, min(row + tile[0], total)), slice(column, min(column + tile[1], vocabulary))


def _inside(targets_T: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the column of each target within a tile (T, 1), and whether the target is in the tile (T,).

    The column is 0 for a target that is not in the tile. Does not synchronize with the GPU.
    """
    inside = (targets_T >= columns.start) & (targets_T < columns.stop)
    return (targets_T - columns.start).where(inside, 0)[:, None], inside


def _buffer(like: Tensor, tile: tuple[int, int]) -> Tensor | None:
    """Allocate a tile of float32 logits for reuse. A new tile each time would cost a page fault for every page."""
    if has_wide_products(like.device.type, like.dtype):
        return None
    return like.new_empty(tile[0] * tile[1], dtype=accumulator_dtype(like.dtype))


def tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None, softcap: float | None) -> Tensor:
    """Compute the logits of a tile in at least float32. The caller may overwrite the result.

    Args:
        hidden: (R, D) hidden states.
        weight: (C, D) rows of the weight of the output layer, of the same dtype.
        bias: (C,) bias, or None.
        buffer: Memory for the result, which may be used. None allocates it.
        softcap: See `head_logprobs`.

    Returns:
        (R, C) logits.
    """
    shape = hidden.shape[0], weight.shape[0]
    logits = product(hidden, weight.t(), out=None if buffer is None else buffer[: shape[0] * shape[1]].view(shape))
    if bias is not None:
        logits.add_(bias)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that the factors of logits have: that of autocast if autocast is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def tile_bytes(device: str) -> int:
    """Return the number of bytes of float32 logits per tile on a type of device."""
    return CHUNK_BYTES if device == "cpu" else DEVICE_BYTES


def tile_shape(total: int, vocabulary: int, chunk_bytes: int, *, device: str) -> tuple[int, int]:
    """Return the numbers of rows and columns of a tile of logits.

    Args:
        total: The number of rows of the whole matrix.
        vocabulary: Its number of columns.
        chunk_bytes: The number of bytes of float32 logits per tile.
        device: The type of the device.
    """
    # A tile that is as wide as the vocabulary has room for more rows.
    most = TILE_ROWS if device == "cpu" else max(DEVICE_ROWS, chunk_bytes // (4 * vocabulary))
    rows = max(1, min(total, most, chunk_bytes // 4))
    columns = max(1, chunk_bytes // (4 * rows))
    # Rows of a tile that do not start on a cache line slow the matrix product down by an eighth.
    return rows, min(vocabulary, columns - columns % 64 if columns > 64 else columns)


def target_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Compute the log-prob of each target under an output layer. See `head_logprobs`."""
    return head_logprobs(hidden, head.weight, head.bias, targets, softcap=head.softcap)


# torch.compile would trace the loop over the tiles, and so compile it again for each number of targets.
@untraced
def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Compute the log-prob of each target under ``softmax(hidden @ weight.T + bias)``.

    The factors of matrix products have the autocast dtype if autocast is on. Logits, softmax and all sums are in float32, or in
    float64 for float64 inputs. See `lightning_align.scoring.products`.

    Args:
        hidden: (T, D) hidden states, each from the position before its target.
        weight: (V, D) weight of the output layer.
        bias: (V,) bias of the output layer, or None.
        targets: (T,) int64 token ids.
        softcap: The C in C tanh(logits / C), which caps the logits. None does not cap them.
        chunk_bytes: The number of bytes of float32 logits per tile. Default is that of the device.

    Returns:
        (T,) log-probs in nats, at least float32.
    """
    dtype, total, vocabulary = product_dtype(hidden), targets.shape[0], weight.shape[0]
    device = hidden.device.type
    tile = tile_shape(total, vocabulary, tile_bytes(device) if chunk_bytes is None else chunk_bytes, device=device)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # With a softcap the backward pass needs the capped logits too, not only the probabilities, so nothing is kept.
    keep = wanted and softcap is None and 4 * total * vocabulary <= KEEP_BYTES
    with torch.autocast(device, enabled=False):
        logps: Tensor = _HeadLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, tile, keep, softcap, dtype
        )
    return logps
