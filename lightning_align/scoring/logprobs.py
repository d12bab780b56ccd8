"""Log-probability of every target of a batch, by the fastest path that a model offers."""

import torch
from torch import Tensor, nn

from lightning_align.models.language_model import HiddenModel, has_hidden, logits_of, vocabulary_size
from lightning_align.scoring.grouping import length_groups, targets_of
from lightning_align.scoring.head import target_logprobs
from lightning_align.scoring.logits import logits_logprobs
from lightning_align.scoring.targets import check_ids, select_targets
from lightning_align.types import TokenBatch


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
    check_ids(tokens, vocabulary_size(model))
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
    for group, width in length_groups(batch):
        within, chosen = targets_of(group, rows, len(tokens))
        parts.append(model.hidden(tokens[group, :width])[within, before[chosen]])
        places.append(chosen)
    return torch.cat(parts)[torch.cat(places).argsort()] if parts else model.hidden(tokens)[rows, before]


def _plain_logprobs(model: nn.Module, batch: TokenBatch, rows: Tensor, before: Tensor, targets: Tensor) -> Tensor:
    """Log-probs (T,) by a model that gives logits and nothing else, at every position that it is shown."""
    tokens = batch["tokens"]
    parts, places = [], []
    for group, width in length_groups(batch):
        within, chosen = targets_of(group, rows, len(tokens))
        logits = logits_of(model, tokens[group, :width])
        check_ids(tokens, logits.shape[-1])
        parts.append(logits_logprobs(logits, within, before[chosen], targets[chosen]))
        places.append(chosen)
        del logits  # without gradients they are free now, and not only when the next are there
    if not parts:
        logits = logits_of(model, tokens)
        check_ids(tokens, logits.shape[-1])
        return logits_logprobs(logits, rows, before, targets)
    return torch.cat(parts)[torch.cat(places).argsort()]
