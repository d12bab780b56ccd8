"""Log-probabilities of responses: the shift, the mask and the softmax, in one place for every method.

The logit at position t scores the token at t + 1. A target is a token to be predicted, so the hidden state that
predicts target t stands at t - 1. Only those hidden states meet the output layer, a chunk at a time, in float32; the
logits of prompts and pads never exist, nor does the whole (T, V) matrix when it is large.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_align.models.language_model import has_hidden, logits_of, vocabulary_size
from lightning_align.types import LogProbs, TokenBatch

# Bytes of one float32 chunk of logits: large enough for a matrix product to run at full speed, small enough to be
# forgotten.
CHUNK_BYTES = 32 * 2**20
# Up to this many bytes the probabilities are kept for the backward pass; above, they are computed again there.
KEEP_BYTES = 256 * 2**20


def select_targets(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The one place of the shift.

    Args:
        batch: (B, N) tokens and targets.

    Returns:
        For each of the T targets, row by row: its row (T,), the position of the hidden state that predicts it (T,), one
        before the target, and its token id (T,).

    Raises:
        ValueError: if the first token of a row is a target: nothing precedes it.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    if not tokens.is_cuda and bool(targets[:, 0].any()):
        raise ValueError("targets[:, 0] is true in some row, but nothing precedes a first token that could predict it")
    rows, before = targets[:, 1:].nonzero(as_tuple=True)
    return rows, before, tokens[rows, before + 1]


class _HeadLogProbs(torch.autograd.Function):
    """log softmax(hidden W' + b) at the targets, with neither logits nor probabilities kept beyond `KEEP_BYTES`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, chunk: int, keep: bool
    ) -> Tensor:
        total, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        logps_T = hidden_TD.new_empty(total, dtype=_accumulator(hidden_TD.dtype))
        lses_T = torch.empty_like(logps_T)
        kept = []
        buffer = None if keep else _buffer(hidden_TD, min(chunk, total), vocabulary)
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            rows = stop - start
            logits = _logits(hidden_TD[start:stop], weight_VD, bias_V, None if buffer is None else buffer[:rows])
            target_logits = logits.gather(1, targets_T[start:stop, None]).squeeze(1)
            maxima = logits.amax(dim=1)
            # In place: from here on the chunk holds exp(logit - max), which is what the backward pass needs.
            sums = logits.sub_(maxima[:, None]).exp_().sum(dim=1)
            lses_T[start:stop] = maxima + sums.log()
            logps_T[start:stop] = target_logits - lses_T[start:stop]
            if keep:
                kept.append(logits.mul_(sums.reciprocal()[:, None]))
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, lses_T)
        ctx.kept, ctx.chunk = kept, chunk
        return logps_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, targets_T, lses_T = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        # Uninitialised would do for the hidden states, whose every row is written, but not for a batch without targets.
        grad_hidden = torch.zeros_like(hidden_TD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=lses_T.dtype) if needs_weight else None
        grad_bias = lses_T.new_zeros(vocabulary) if needs_bias else None
        # A second backward pass (retain_graph) finds nothing kept, since it is overwritten below, and computes again.
        kept, ctx.kept = ctx.kept, []
        buffer = None if kept else _buffer(hidden_TD, min(ctx.chunk, total), vocabulary)
        for index, start in enumerate(range(0, total, ctx.chunk)):
            stop = min(start + ctx.chunk, total)
            if kept:
                grad_logits, kept[index] = kept[index], None
            else:
                out = None if buffer is None else buffer[: stop - start]
                grad_logits = _logits(hidden_TD[start:stop], weight_VD, bias_V, out)
                grad_logits.sub_(lses_T[start:stop, None]).exp_()
            # d logp / d logits = onehot - p
            scale = grad_T[start:stop, None]
            grad_logits.mul_(-scale).scatter_add_(1, targets_T[start:stop, None], scale)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(hidden_TD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[start:stop])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), hidden_TD[start:stop])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
            None,
            None,
            None,
        )


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor | None:
    """Room for one chunk of float32 logits, used over and over: a fresh one each time costs a page fault for every page."""
    return like.new_empty(rows, columns) if like.dtype is _accumulator(like.dtype) else None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Logits of a chunk in at least float32, in memory that the caller may overwrite."""
    logits = torch.mm(hidden, weight.t(), out=out) if out is not None else torch.mm(hidden, weight.t())
    logits = logits.to(_accumulator(logits.dtype))
    return logits if bias is None else logits.add_(bias)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b in place, in the dtype of ``into``."""
    if a.dtype is into.dtype:
        into.addmm_(a, b)
    else:
        into += torch.mm(a, b)


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Log-probability of each target under ``softmax(hidden @ weight.T + bias)``.

    Products run in the autocast dtype where autocast is on, the softmax and all sums in float32.

    Args:
        hidden: (T, D) hidden states, each the one before its target.
        weight: (V, D) of the output layer.
        bias: (V,) or None.
        targets: (T,) int64 token ids.
        chunk_bytes: bytes of float32 logits to hold at a time.

    Returns:
        (T,) float32, in nats.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    row_bytes = 4 * weight.shape[0]
    chunk = max(1, chunk_bytes // row_bytes)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = wanted and targets.shape[0] * row_bytes <= KEEP_BYTES
    with torch.autocast(device, enabled=False):
        # The casts stand outside of the function, so that autograd returns gradients in the dtype of the parameters.
        logps: Tensor = _HeadLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), weight.to(dtype), bias, targets, chunk, keep
        )
    return logps


class _LogitsLogProbs(torch.autograd.Function):
    """log softmax of given logits at some positions, without a second (B, N, V) tensor in the forward pass."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, where_T: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        total = where_T.shape[0]
        logps_T = logits_MV.new_empty(total, dtype=_accumulator(logits_MV.dtype))
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
        grad_MV = torch.zeros_like(logits_MV)
        for start in range(0, where_T.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad_logits = logits_MV.index_select(0, where_T[rows]).to(lses_T.dtype).sub_(lses_T[rows, None]).exp_()
            scale = grad_T[rows, None]
            grad_logits.mul_(-scale).scatter_add_(1, targets_T[rows, None], scale)
            grad_MV[where_T[rows]] = grad_logits.to(grad_MV.dtype)
        return grad_MV, None, None, None


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


def token_logprobs(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of every target of a batch, by the fastest path that the model offers.

    Args:
        model: any language model (see `lightning_align.models.language_model`).
        batch: (B, N), padded on the right.

    Returns:
        Log-probs (T,) float32 in nats, row by row, and the row (T,) of each.

    Raises:
        ValueError: if a token id is outside of the vocabulary, or a first token is a target.
    """
    rows, before, targets = select_targets(batch)
    tokens, mask = batch["tokens"], batch["mask"]
    _check_ids(tokens, vocabulary_size(model))
    if not has_hidden(model):
        logits = logits_of(model, tokens)
        _check_ids(tokens, logits.shape[-1])
        return logits_logprobs(logits, rows, before, targets), rows
    if hasattr(model, "packed_hidden") and not tokens.is_cuda and not bool(mask.all()):
        place = mask.flatten().cumsum(0).view_as(mask) - 1
        hidden = model.packed_hidden(tokens, mask).index_select(0, place[rows, before])
    else:
        hidden = model.hidden(tokens)[rows, before]
    return head_logprobs(hidden, *model.head, targets), rows


def response_logprobs(model: nn.Module, batch: TokenBatch) -> LogProbs:
    """Sums and counts of the log-probs of the responses.

    Args:
        model: any language model.
        batch: (B, N), padded on the right.

    Returns:
        (B,) sums in nats and (B,) counts.
    """
    logps, rows = token_logprobs(model, batch)
    sums = logps.new_zeros(batch["tokens"].shape[0]).index_add(0, rows, logps)
    return LogProbs(sums, batch["targets"].sum(dim=1))


def _check_ids(tokens: Tensor, vocabulary: int | None) -> None:
    # On a GPU the comparison would stall the queue at every step; there, the data module's check stands alone.
    if vocabulary is not None and not tokens.is_cuda and tokens.numel() and int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"a token id is {int(tokens.max())}, but the model's vocabulary has {vocabulary} entries: "
            "give the backbone as many as the tokenizer has"
        )
