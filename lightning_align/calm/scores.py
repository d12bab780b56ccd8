"""Log-probs of responses under a composition."""

from collections.abc import Sequence

from lightning_align.calm.datamodule import CALMBatch
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import AugmentInput
from lightning_align.models.language_model import has_hidden
from lightning_align.models.unpadded import unpadded_batch
from lightning_align.scoring.head import target_logprobs
from lightning_align.scoring.logits import logits_logprobs
from lightning_align.scoring.sums import sum_logprobs
from lightning_align.scoring.targets import select_targets
from lightning_align.types import LogProbs


def composed_logprobs(model: CALM, batch: CALMBatch, inputs: Sequence[AugmentInput | None]) -> LogProbs:
    """Compute the log-probs of the responses under a composition.

    Args:
        model: The composition.
        batch: (B, N) token rows, padded on the right.
        inputs: The input of each augment.

    Returns:
        The sum of the log-probs of each row's targets, and their count.
    """
    rows, before, targets = select_targets(batch)
    if has_hidden(model):
        unpadded = unpadded_batch(model, batch)
        if unpadded is None:
            hidden = model.hidden(batch["tokens"], inputs=inputs)[rows, before]
        else:
            hidden = model.unpadded_hidden(unpadded, inputs=inputs).index_select(0, unpadded.index(rows, before))
        logps = target_logprobs(hidden, model.head, targets)
    else:
        logps = logits_logprobs(model(batch["tokens"], inputs=inputs), rows, before, targets)
    return sum_logprobs(logps, rows, batch["targets"])
