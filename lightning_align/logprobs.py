"""Log-probabilities of responses: the shift, the mask and the softmax, in one place for every method.

The logit at position t scores the token at t + 1. A target is a token to be predicted, so the hidden state that
predicts target t stands at t - 1. Only those hidden states meet the output layer, a tile of rows and vocabulary at a
time, in float32; the logits of prompts and pads never exist, nor does the whole (T, V) matrix when it is large.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_align.distributed import world
from lightning_align.models.language_model import Head, HiddenModel, has_hidden, logits_of, vocabulary_size
from lightning_align.types import LogProbs, TokenBatch

# A tile of float32 logits: large enough for a matrix product to run at full speed, small enough to stay in the
# last-level cache from one pass over it to the next. About square, since a thin one would stream the weight, and its
# gradient, from memory for every few rows.
CHUNK_BYTES = 16 * 2**20
TILE_ROWS = 2048
# Up to this many bytes the probabilities are kept for the backward pass; above, they are computed again there.
KEEP_BYTES = 256 * 2**20
# Groups of rows of about one length that a model without a packed layout is run on, one after the other.
LENGTH_GROUPS = 4


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
    """log softmax(hidden W' + b) at the targets, with neither logits nor probabilities kept beyond `KEEP_BYTES`.

    Only thin things are scaled row by row: with P the probabilities, d logp / d logits = onehot - P, so gradients are
    -g (P - onehot) W and (P - onehot)' (-g hidden), and no pass over a tile multiplies it with g.
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
    ) -> Tensor:
        total, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        target_logits_T = hidden_TD.new_zeros(total, dtype=_accumulator(hidden_TD.dtype))
        # The log-sum-exp of every row over each block of the vocabulary.
        parts = target_logits_T.new_empty(-(-vocabulary // tile[1]), total)
        kept = []
        buffer = None if keep else _buffer(hidden_TD, tile)
        for rows, columns in _tiles(total, vocabulary, tile):
            logits = _logits(hidden_TD[rows], weight_VD[columns], None if bias_V is None else bias_V[columns], buffer, softcap)
            index, inside = _inside(targets_T[rows], columns)
            target_logits_T[rows] += logits.gather(1, index).squeeze(1).where(inside, 0)
            # Where all of a block is forbidden (-inf), so is its maximum, and -inf - -inf would be NaN.
            maxima = logits.amax(dim=1).clamp_(min=torch.finfo(logits.dtype).min)
            # In place: from here on the tile holds exp(logit - max), of which a scaling makes probabilities.
            sums = logits.sub_(maxima[:, None]).exp_().sum(dim=1)
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
        hidden_TD, weight_VD, bias_V, targets_T, lses_T = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        grad_hidden = torch.zeros_like(hidden_TD, dtype=lses_T.dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=lses_T.dtype) if needs_weight else None
        grad_bias = lses_T.new_zeros(vocabulary) if needs_bias else None
        scale_T = -grad_T
        scaled_TD = (hidden_TD * scale_T[:, None]).to(hidden_TD.dtype)
        # A second backward pass (retain_graph) finds nothing kept, since it is overwritten below, and computes again.
        kept, ctx.kept = ctx.kept[::-1], []
        buffer = None if kept else _buffer(hidden_TD, ctx.tile)
        for rows, columns in _tiles(total, vocabulary, ctx.tile):
            slope = None
            if kept:
                grad, maxima = kept.pop()
                grad.mul_((maxima - lses_T[rows]).exp_()[:, None])
            else:
                bias = None if bias_V is None else bias_V[columns]
                grad = _logits(hidden_TD[rows], weight_VD[columns], bias, buffer, ctx.softcap)
                if ctx.softcap is not None:
                    slope = (grad / ctx.softcap).square_().neg_().add_(1)
                grad.sub_(lses_T[rows, None]).exp_()
            index, inside = _inside(targets_T[rows], columns)
            grad.scatter_add_(1, index, -inside[:, None].to(grad.dtype))
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias[columns].addmv_(grad.t(), scale_T[rows])
            grad = grad.to(hidden_TD.dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], grad, weight_VD[columns])
            if grad_weight is not None:
                _add_product(grad_weight[columns], grad.t(), scaled_TD[rows])
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale_T[:, None]).to(hidden_TD.dtype),
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
            None,
            None,
            None,
            None,
        )


def _tiles(total: int, vocabulary: int, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Tiles of a (total, vocabulary) matrix; a block of the vocabulary stays in the cache while the rows pass."""
    for column in range(0, vocabulary, tile[1]):
        for row in range(0, total, tile[0]):
            yield slice(row, min(row + tile[0], total)), slice(column, min(column + tile[1], vocabulary))


def _inside(targets_T: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each target within a tile (T, 1), any if it has none there, and whether it has (T,); without a sync."""
    inside = (targets_T >= columns.start) & (targets_T < columns.stop)
    return (targets_T - columns.start).where(inside, 0)[:, None], inside


def _buffer(like: Tensor, tile: tuple[int, int]) -> Tensor | None:
    """Room for one tile of float32 logits, used over and over: a fresh one would cost a page fault for every page."""
    return like.new_empty(tile[0] * tile[1]) if like.dtype is _accumulator(like.dtype) else None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None, softcap: float | None) -> Tensor:
    """Logits of a tile in at least float32, in memory that the caller may overwrite."""
    shape = hidden.shape[0], weight.shape[0]
    out = None if buffer is None else buffer[: shape[0] * shape[1]].view(shape)
    logits = torch.mm(hidden, weight.t(), out=out)
    logits = logits.to(_accumulator(logits.dtype))
    if bias is not None:
        logits.add_(bias)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b in place, in the dtype of ``into``."""
    if a.dtype is into.dtype:
        into.addmm_(a, b)
    else:
        into += torch.mm(a, b)


def target_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Log-probability of each target under an output layer; see `head_logprobs`."""
    return head_logprobs(hidden, head.weight, head.bias, targets, softcap=head.softcap)


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Log-probability of each target under ``softmax(hidden @ weight.T + bias)``, the logits perhaps capped.

    Products run in the autocast dtype where autocast is on, the softmax and all sums in float32.

    Args:
        hidden: (T, D) hidden states, each the one before its target.
        weight: (V, D) of the output layer.
        bias: (V,) or None.
        targets: (T,) int64 token ids.
        softcap: C of C tanh(logits / C); None leaves them as they are.
        chunk_bytes: bytes of float32 logits to hold at a time, where they are not kept for the backward pass.

    Returns:
        (T,) float32, in nats.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    total, vocabulary = targets.shape[0], weight.shape[0]
    rows = max(1, min(total, TILE_ROWS, chunk_bytes // 4))
    columns = max(1, chunk_bytes // (4 * rows))
    # Rows of a tile that begin off a cache line cost the matrix product an eighth.
    tile = rows, min(vocabulary, columns - columns % 64 if columns > 64 else columns)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # Capped logits are wanted once more in the backward pass, besides their probabilities.
    keep = wanted and softcap is None and 4 * total * vocabulary <= KEEP_BYTES
    with torch.autocast(device, enabled=False):
        # The casts stand outside of the function, so that autograd returns gradients in the dtype of the parameters.
        logps: Tensor = _HeadLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), weight.to(dtype), bias, targets, tile, keep, softcap
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
        return _plain_logprobs(model, batch, rows, before, targets), rows
    if hasattr(model, "packed_hidden") and not tokens.is_cuda and not bool(mask.all()):
        place = mask.flatten().cumsum(0).view_as(mask) - 1
        hidden = model.packed_hidden(tokens, mask).index_select(0, place[rows, before])
    else:
        hidden = _target_hidden(model, batch, rows, before)
    return target_logprobs(hidden, model.head, targets), rows


def _target_hidden(model: HiddenModel, batch: TokenBatch, rows: Tensor, before: Tensor) -> Tensor:
    """Hidden states (T, D) before the targets, by a model that has no packed layout."""
    tokens = batch["tokens"]
    parts, places = [], []
    for group, width in _length_groups(batch):
        within, chosen = _targets_of(group, rows, len(tokens))
        parts.append(model.hidden(tokens[group, :width])[within, before[chosen]])
        places.append(chosen)
    return torch.cat(parts)[torch.cat(places).argsort()] if parts else model.hidden(tokens)[rows, before]


def _targets_of(group: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The targets of a group of rows: for each its row within the group, and its number among all targets."""
    place = rows.new_full((num_rows,), -1)
    place[group] = torch.arange(len(group))
    chosen = (place[rows] >= 0).nonzero().squeeze(1)
    return place[rows[chosen]], chosen


def _plain_logprobs(model: nn.Module, batch: TokenBatch, rows: Tensor, before: Tensor, targets: Tensor) -> Tensor:
    """Log-probs (T,) by a model that gives logits and nothing else, at every position that it is shown."""
    tokens = batch["tokens"]
    parts, places = [], []
    for group, width in _length_groups(batch):
        within, chosen = _targets_of(group, rows, len(tokens))
        logits = logits_of(model, tokens[group, :width])
        _check_ids(tokens, logits.shape[-1])
        parts.append(logits_logprobs(logits, within, before[chosen], targets[chosen]))
        places.append(chosen)
        del logits  # without gradients they are free now, and not only when the next are there
    if not parts:
        logits = logits_of(model, tokens)
        _check_ids(tokens, logits.shape[-1])
        return logits_logprobs(logits, rows, before, targets)
    return torch.cat(parts)[torch.cat(places).argsort()]


def _length_groups(batch: TokenBatch) -> list[tuple[Tensor, int]]:
    """Rows of about one length, and the positions that score their targets: causality makes the others superfluous.

    On a CPU a pad costs what a token costs. On a GPU looking at lengths would stall the queue, and of a sharded model
    every rank must run the same number of forward passes: there, and where it would save less than a tenth, no groups.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    if tokens.is_cuda or not tokens.numel() or world()[1] > 1:
        return []
    widths = (targets * torch.arange(tokens.shape[1])).amax(dim=1).clamp(min=1)
    groups = [(group, int(widths[group[-1]])) for group in widths.argsort(stable=True).chunk(LENGTH_GROUPS)]
    return groups if sum(len(group) * width for group, width in groups) <= 0.9 * tokens.numel() else []


def response_logprobs(model: nn.Module, batch: TokenBatch) -> LogProbs:
    """Sums and counts of the log-probs of the responses.

    Args:
        model: any language model.
        batch: (B, N), padded on the right.

    Returns:
        (B,) sums in nats, weighted where the batch has ``target_weights``, and (B,) counts.
    """
    return sum_logprobs(*token_logprobs(model, batch), batch["targets"], batch.get("target_weights"))


def sum_logprobs(logps: Tensor, rows: Tensor, targets: Tensor, weights: Tensor | None = None) -> LogProbs:
    """Sums and counts of responses.

    Args:
        logps: (T,) log-prob of each target, as `token_logprobs` gives them.
        rows: (T,) its row.
        targets: (B, N) bool.
        weights: (B, N) what each counts.
    """
    if weights is not None:
        logps = logps * weights[:, 1:][targets[:, 1:]]
    # One after the other in float32, hundreds of terms lose a digit that the difference of two such sums would have.
    wide = logps if logps.device.type == "mps" else logps.double()
    return LogProbs(wide.new_zeros(targets.shape[0]).index_add(0, rows, wide).to(logps.dtype), targets.sum(dim=1))


@torch.no_grad()
def response_collisions(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probability that two tokens drawn at a position are the same, log sum_v p_v^2, summed over the targets.

    Args:
        model: any language model; it runs once more, in the mode that it is in.
        batch: (B, N), padded on the right.

    Returns:
        (B,) in nats.
    """
    rows, before, _ = select_targets(batch)
    outputs: Callable[[Tensor], Tensor]
    if has_hidden(model):
        states, head = model.hidden(batch["tokens"])[rows, before], model.head
        states, weight = (x.to(_accumulator(states.dtype)) for x in (states, head.weight))
        outputs = head._replace(weight=weight).logits
    else:
        states = logits_of(model, batch["tokens"])[rows, before]
        states = states.to(_accumulator(states.dtype))
        outputs = torch.clone
        weight = states.t()
    total = states.new_zeros(batch["tokens"].shape[0])
    chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for start in range(0, len(rows), chunk):
        logits = outputs(states[start : start + chunk])
        total.index_add_(0, rows[start : start + chunk], (2 * logits).logsumexp(dim=1) - 2 * logits.logsumexp(dim=1))
    return total


def _check_ids(tokens: Tensor, vocabulary: int | None) -> None:
    # On a GPU the comparison would stall the queue at every step; there, the data module's check stands alone.
    if vocabulary is not None and not tokens.is_cuda and tokens.numel() and int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"a token id is {int(tokens.max())}, but the model's vocabulary has {vocabulary} entries: "
            "give the backbone as many as the tokenizer has"
        )
