"""The shift by one between positions and targets: which hidden state predicts which token."""

from typing import Any

import torch
from torch import Tensor

from lightning_align.models.documents import document_positions
from lightning_align.models.unpadded import first_true
from lightning_align.types import TokenBatch


def select_targets(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Find the targets of a batch, and the positions that predict them. This is the only place of the shift by one.

    Args:
        batch: (B, N) tokens and targets.

    Returns:
        For each of the T targets, row by row: its (T,) row (also in a packed batch), the (T,) position of the hidden state that
        predicts it (one before the target), and its (T,) token id.

    Raises:
        ValueError: If the first token of a row or document is a target. No hidden state predicts it. Only checked on the CPU,
            because a check makes the host wait for a GPU.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    if tokens.device.type == "cpu":
        if bool(targets[:, 0].any()):
            raise ValueError(
                "`targets[:, 0]` must be false in every row, but got true. No token precedes the first one, so it cannot be "
                "predicted. Start the targets at the second token or later."
            )
        if "document_ids" in batch and bool((targets & (document_positions(batch["document_ids"]) == 0)).any()):
            raise ValueError(
                "`targets` must be false at the first token of every document and at padding, but got true. A token is not "
                "predicted from the document before it. Start the targets at the second token of each document or later."
            )
    rows, before = _places(targets[:, 1:], batch.get("num_targets"))
    return rows, before, tokens[rows, before + 1]


def _places(targets: Tensor, num_targets: int | None) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of true elements, row by row. With their number it does not wait for a device."""
    if targets.device.type == "cpu" or num_targets is None:
        rows, columns = targets.nonzero(as_tuple=True)
        return rows, columns
    flat = targets.flatten()
    # A batch that was changed after its targets were counted must not train on other tokens without a word.
    torch._assert_async(flat.sum() == num_targets)
    where = first_true(flat, num_targets)
    return where // targets.shape[1], where % targets.shape[1]


def host_counts(batch: TokenBatch) -> dict[str, Any]:
    """Count a batch while it is on the CPU, so that no step has to ask a device.

    Args:
        batch: (B, N) tokens on the CPU.

    Returns:
        ``num_targets``, ``num_tokens`` and ``lengths`` of a `TokenBatch`.
    """
    mask, documents = batch["mask"], batch.get("document_ids")
    lengths = mask.sum(1) if documents is None else documents[documents >= 0].bincount()
    # The first token of a row is never predicted.
    numbers = {"num_targets": int(batch["targets"][:, 1:].sum()), "num_tokens": int(mask[:, 1:].sum())}
    return {**numbers, "lengths": lengths.tolist()}


def check_ids(tokens: Tensor, vocabulary: int | None) -> None:
    """Check that every token id is in the vocabulary.

    Args:
        tokens: (B, N) token ids.
        vocabulary: The number of entries of the vocabulary, or None if it is unknown.

    Raises:
        ValueError: If a token id is outside of the vocabulary. Only checked on the CPU.
    """
    # On a GPU the comparison would stall the queue at every step. There, only the data module checks the ids.
    if vocabulary is not None and tokens.device.type == "cpu" and tokens.numel() and int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"Token ids must be below {vocabulary}, the vocabulary size of the model, but got {int(tokens.max())}. "
            "Give the backbone the vocabulary size of the tokenizer."
        )
