"""Sums of log-probs over responses."""

import torch
from torch import Tensor, nn

from lightning_align.models.unpadded import first_true
from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.types import LogProbs, TokenBatch


def response_logprobs(model: nn.Module, batch: TokenBatch) -> LogProbs:
    """Compute the sum of the log-probs of each response, and its number of tokens.

    Args:
        model: Any language model.
        batch: (B, N) tokens, padded on the right. ``target_weights``, if present, weight the terms of the sums.

    Returns:
        (B,) sums in nats, and (B,) counts of targets. Of a packed batch with R documents, (R,) sums and counts.
    """
    logps, rows = token_logprobs(model, batch)
    targets, weights = batch["targets"], batch.get("target_weights")
    return sum_logprobs(logps, rows, targets, weights, num_documents=num_documents(batch))


def num_documents(batch: TokenBatch) -> int | None:
    """Return the number of documents of a packed batch, or None for a batch that is not packed."""
    if "document_ids" not in batch:
        return None
    # Reading it from a tensor on a GPU would wait for the GPU.
    return len(batch["rows"]) if "rows" in batch else int(batch["document_ids"].max()) + 1


def sum_logprobs(
    logps: Tensor, rows: Tensor, targets: Tensor, weights: Tensor | None = None, *, num_documents: int | None = None
) -> LogProbs:
    """Sum the log-probs of the targets over each row.

    Args:
        logps: (T,) log-prob of each target in nats, in the order of `token_logprobs`.
        rows: (T,) row of each target.
        targets: (B, N) bool, true at targets.
        weights: (B, N) weight of each target's log-prob. By default all weights are 1.
        num_documents: The number of documents R of a packed batch. ``rows`` are then the numbers of documents.

    Returns:
        (B,) or (R,) sums in nats in the dtype of ``logps``, and counts of targets. Weights do not change the counts.
    """
    if weights is not None:
        logps = logps * _selected(weights[:, 1:], targets[:, 1:], len(logps))
    # Float32 sums of hundreds of terms would lose a digit that matters in the difference of two such sums. MPS has no float64.
    wide = logps if logps.device.type == "mps" else logps.double()
    size = targets.shape[0] if num_documents is None else num_documents
    counts = targets.sum(dim=1) if num_documents is None else rows.new_zeros(size).index_add(0, rows, torch.ones_like(rows))
    return LogProbs(wide.new_zeros(size).index_add(0, rows, wide).to(logps.dtype), counts)


def _selected(values: Tensor, targets: Tensor, count: int) -> Tensor:
    """Select the values (B, N) at the targets, row by row. Their number is known, so that a device need not be waited for."""
    if targets.device.type == "cpu":
        return values[targets]
    return values.flatten().index_select(0, first_true(targets.flatten(), count))
