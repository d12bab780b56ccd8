"""The probability that two tokens sampled at the same position are equal."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_align.models.language_model import has_hidden, logits_of
from lightning_align.scoring.head import CHUNK_BYTES, accumulator_dtype
from lightning_align.scoring.targets import select_targets
from lightning_align.types import TokenBatch


@torch.no_grad()
def response_collisions(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Compute log sum_v p_v^2 at each target, and sum it over the targets of each row.

    This is the log-probability that two tokens sampled at the same position are equal.

    Args:
        model: Any language model. It runs one extra forward pass, and its training or evaluation mode is not changed.
        batch: (B, N) tokens, padded on the right.

    Returns:
        (B,) sums in nats.
    """
    rows, before, _ = select_targets(batch)
    outputs: Callable[[Tensor], Tensor]
    if has_hidden(model):
        states, head = model.hidden(batch["tokens"])[rows, before], model.head
        states, weight = (x.to(accumulator_dtype(states.dtype)) for x in (states, head.weight))
        outputs = head._replace(weight=weight).logits
    else:
        states = logits_of(model, batch["tokens"])[rows, before]
        states = states.to(accumulator_dtype(states.dtype))
        outputs = torch.clone
        weight = states.t()
    total = states.new_zeros(batch["tokens"].shape[0])
    chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for start in range(0, len(rows), chunk):
        logits = outputs(states[start : start + chunk])
        total.index_add_(0, rows[start : start + chunk], (2 * logits).logsumexp(dim=1) - 2 * logits.logsumexp(dim=1))
    return total
