"""The probability that two tokens sampled at the same position are equal."""

import torch
from torch import Tensor, nn

from lightning_align.models.language_model import Head, has_hidden, logits_of
from lightning_align.models.shared_rows import computed_rows
from lightning_align.scoring import head as tiling
from lightning_align.scoring.products import accumulator_dtype
from lightning_align.scoring.targets import select_targets
from lightning_align.types import TokenBatch


@torch.no_grad()
def response_collisions(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Compute log sum_v p_v^2 at each target, and sum it over the targets of each row.

    This is the log-probability that two tokens sampled at the same position are equal. Logits, softmax and sums are in at least
    float32, as in `lightning_align.scoring.head.head_logprobs`.

    Args:
        model: Any language model. It runs one extra forward pass, and its training or evaluation mode is not changed.
        batch: (B, N) tokens, padded on the right.

    Returns:
        (B,) sums in nats.
    """
    rows, before, _ = select_targets(batch)
    if has_hidden(model):
        unpadded = computed_rows(model, batch)
        if unpadded is None:
            states = model.hidden(batch["tokens"])[rows, before]
        else:
            states = model.unpadded_hidden(unpadded).index_select(0, unpadded.index(rows, before))
        head = model.head
        collisions = _head_collisions(states, head, tiling.product_dtype(states))
    else:
        collisions = _collisions(logits_of(model, batch["tokens"])[rows, before])
    return collisions.new_zeros(batch["tokens"].shape[0]).index_add_(0, rows, collisions)


def _head_collisions(states: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Compute log sum_v p_v^2 of each of (T, D) hidden states, one tile of logits at a time."""
    total, vocabulary, device = states.shape[0], head.weight.shape[0], states.device.type
    tile = tiling.tile_shape(total, vocabulary, tiling.tile_bytes(device), device=device)
    with torch.autocast(device, enabled=False):
        states, weight = states.to(dtype), head.weight.to(dtype)
        # The log-sum-exp of each row over each block of the vocabulary: of the logits, and of the logits times 2.
        parts = states.new_empty(2, -(-vocabulary // tile[1]), total, dtype=accumulator_dtype(dtype))
        for rows, columns in tiling.tiles(total, vocabulary, tile):
            bias = None if head.bias is None else head.bias[columns]
            logits = tiling.tile_logits(states[rows], weight[columns], bias, None, head.softcap)
            block = columns.start // tile[1]
            parts[0, block, rows] = logits.logsumexp(dim=1)
            parts[1, block, rows] = logits.mul_(2).logsumexp(dim=1)
        once, twice = parts.logsumexp(dim=1)
        result: Tensor = twice - 2 * once
        return result


def _collisions(logits: Tensor) -> Tensor:
    """Compute log sum_v p_v^2 of each of (T, V) logits."""
    total = logits.new_empty(logits.shape[0], dtype=accumulator_dtype(logits.dtype))
    chunk = max(1, tiling.tile_bytes(logits.device.type) // (4 * logits.shape[1]))
    for start in range(0, len(total), chunk):
        part = logits[start : start + chunk].to(total.dtype)
        total[start : start + chunk] = (2 * part).logsumexp(dim=1) - 2 * part.logsumexp(dim=1)
    return total
