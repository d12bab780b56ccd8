"""A known mistake: log-probs without the shift by one token, averaged instead of summed. Two studies compare with it."""

import torch

from lightning_align.types import LogProbs, TokenBatch


def unshifted_means(model: torch.nn.Module, batch: TokenBatch) -> LogProbs:
    """Mean log-probs without the shift: the logits at each token score that token itself."""
    logps = model(batch["tokens"]).log_softmax(-1).gather(2, batch["tokens"][..., None])[..., 0]
    counts = batch["targets"].sum(dim=1)
    return LogProbs((logps * batch["targets"]).sum(dim=1) / counts, counts)
