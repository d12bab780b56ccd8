"""The shift by one between positions and targets: which hidden state predicts which token."""

from torch import Tensor

from lightning_align.models.documents import document_positions
from lightning_align.types import TokenBatch


def select_targets(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Find the targets of a batch, and the positions that predict them. This is the only place of the shift by one.

    Args:
        batch: (B, N) tokens and targets.

    Returns:
        For each of the T targets, row by row: its (T,) row (also in a packed batch), the (T,) position of the hidden state that
        predicts it (one before the target), and its (T,) token id.

    Raises:
        ValueError: If the first token of a row or document is a target. No hidden state predicts it. Not checked on a GPU, to
            avoid a synchronization.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    if not tokens.is_cuda:
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
    rows, before = targets[:, 1:].nonzero(as_tuple=True)
    return rows, before, tokens[rows, before + 1]


def check_ids(tokens: Tensor, vocabulary: int | None) -> None:
    """Check that every token id is in the vocabulary.

    Args:
        tokens: (B, N) token ids.
        vocabulary: The number of entries of the vocabulary, or None if it is unknown.

    Raises:
        ValueError: If a token id is outside of the vocabulary. Not checked on a GPU.
    """
    # On a GPU the comparison would stall the queue at every step. There, only the data module checks the ids.
    if vocabulary is not None and not tokens.is_cuda and tokens.numel() and int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"Token ids must be below {vocabulary}, the vocabulary size of the model, but got {int(tokens.max())}. "
            "Give the backbone the vocabulary size of the tokenizer."
        )
