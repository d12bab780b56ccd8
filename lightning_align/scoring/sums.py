"""Sums of the log-probabilities of responses."""

from torch import Tensor, nn

from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.types import LogProbs, TokenBatch


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
