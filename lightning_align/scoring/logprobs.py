"""Log-probs of all targets of a batch, by the fastest path that the model supports."""

import torch
from torch import Tensor, nn

from lightning_align.models.documents import check_packing
from lightning_align.models.language_model import HiddenModel, has_hidden, logits_of, vocabulary_size
from lightning_align.models.routers import announce_mask
from lightning_align.models.shared_rows import computed_rows
from lightning_align.scoring.grouping import length_groups, targets_of
from lightning_align.scoring.head import target_logprobs
from lightning_align.scoring.logits import logits_logprobs
from lightning_align.scoring.targets import check_ids, select_targets
from lightning_align.types import TokenBatch


def token_logprobs(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Compute the log-prob of each target of a batch, by the fastest path that the model supports.

    Args:
        model: Any language model (see `lightning_align.models.language_model`).
        batch: (B, N) tokens, padded on the right.

    Returns:
        (T,) log-probs in nats, at least float32, row by row, and the (T,) row of each. In a packed batch, the number of its
        document instead of its row.

    Raises:
        ValueError: If a token id is outside of the vocabulary, if the first token of a row or document is a target, or if the
            batch is packed and the model cannot keep documents apart.
    """
    rows, before, targets = select_targets(batch)
    tokens, mask = batch["tokens"], batch["mask"]
    check_ids(tokens, vocabulary_size(model))
    announce_mask(model, mask)
    if has_hidden(model) and (unpadded := computed_rows(model, batch)) is not None:
        hidden = model.unpadded_hidden(unpadded).index_select(0, unpadded.index(rows, before))
        groups = batch["document_ids"][rows, before] if "document_ids" in batch else rows
        return target_logprobs(hidden, model.head, targets), groups
    if "document_ids" in batch:
        documents = batch["document_ids"]
        return _document_logprobs(model, tokens, documents, rows, before, targets), documents[rows, before]
    if not has_hidden(model):
        return _plain_logprobs(model, batch, rows, before, targets), rows
    if hasattr(model, "packed_hidden") and tokens.device.type == "cpu" and not bool(mask.all()):
        place = mask.flatten().cumsum(0).view_as(mask) - 1
        hidden = model.packed_hidden(tokens, mask).index_select(0, place[rows, before])
    else:
        hidden = _target_hidden(model, batch, rows, before)
    return target_logprobs(hidden, model.head, targets), rows


def _groups(model: nn.Module, batch: TokenBatch) -> list[tuple[Tensor, int]]:
    """Return the groups of rows that are computed together, or no groups if all rows are."""
    # Groups leave out the tokens after the last target. The load of expert routers is that of all tokens.
    return [] if getattr(model, "router_record", None) is not None else length_groups(batch)


def _target_hidden(model: HiddenModel, batch: TokenBatch, rows: Tensor, before: Tensor) -> Tensor:
    """Compute the (T, D) hidden states before the targets, with a model that has no packed layout."""
    tokens = batch["tokens"]
    parts, places = [], []
    for group, width in _groups(model, batch):
        within, chosen = targets_of(group, rows, len(tokens))
        parts.append(model.hidden(tokens[group, :width])[within, before[chosen]])
        places.append(chosen)
    return torch.cat(parts)[torch.cat(places).argsort()] if parts else model.hidden(tokens)[rows, before]


def _plain_logprobs(model: nn.Module, batch: TokenBatch, rows: Tensor, before: Tensor, targets: Tensor) -> Tensor:
    """Compute the (T,) log-probs with a model that returns only logits, which it does for every position."""
    tokens = batch["tokens"]
    parts, places = [], []
    for group, width in _groups(model, batch):
        within, chosen = targets_of(group, rows, len(tokens))
        logits = logits_of(model, tokens[group, :width])
        check_ids(tokens, logits.shape[-1])
        parts.append(logits_logprobs(logits, within, before[chosen], targets[chosen]))
        places.append(chosen)
        del logits  # Without gradients this frees them now, and not only after the next ones exist.
    if not parts:
        logits = logits_of(model, tokens)
        check_ids(tokens, logits.shape[-1])
        return logits_logprobs(logits, rows, before, targets)
    return torch.cat(parts)[torch.cat(places).argsort()]


def _document_logprobs(
    model: nn.Module, tokens: Tensor, documents: Tensor, rows: Tensor, before: Tensor, targets: Tensor
) -> Tensor:
    """Compute the (T,) log-probs of a packed batch."""
    check_packing(model)
    if has_hidden(model):
        return target_logprobs(model.hidden(tokens, documents=documents)[rows, before], model.head, targets)
    logits = logits_of(model, tokens, documents=documents)
    check_ids(tokens, logits.shape[-1])
    return logits_logprobs(logits, rows, before, targets)
