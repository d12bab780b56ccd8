"""Sums of log-probs over responses."""

from torch import Tensor, nn

from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.types import LogProbs, TokenBatch


def response_logprobs(model: nn.Module, batch: TokenBatch) -> LogProbs:
    """Compute the sum of the log-probs of each response, and its number of tokens.

    Args:
        model: Any language model.
        batch: (B, N) tokens, padded on the right. ``target_weights``, if present, weight the terms of the sums.

    Returns:
        (B,) sums in nats, and (B,) counts of targets.
    """
    return sum_logprobs(*token_logprobs(model, batch), batch["targets"], batch.get("target_weights"))


def sum_logprobs(logps: Tensor, rows: Tensor, targets: Tensor, weights: Tensor | None = None) -> LogProbs:
    """Sum the log-probs of the targets over each row.

    Args:
        logps: (T,) log-prob of each target in nats, in the order of `token_logprobs`.
        rows: (T,) row of each target.
        targets: (B, N) bool, true at targets.
        weights: (B, N) weight of each target's log-prob. By default all weights are 1.

    Returns:
        (B,) sums in nats in the dtype of ``logps``, and (B,) counts of targets. Weights do not change the counts.
    """
    if weights is not None:
        logps = logps * weights[:, 1:][targets[:, 1:]]
    # Float32 sums of hundreds of terms would lose a digit that matters in the difference of two such sums. MPS has no float64.
    wide = logps if logps.device.type == "mps" else logps.double()
    return LogProbs(wide.new_zeros(targets.shape[0]).index_add(0, rows, wide).to(logps.dtype), targets.sum(dim=1))
