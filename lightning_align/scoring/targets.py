"""The shift: which hidden state predicts which token."""

from torch import Tensor

from lightning_align.types import TokenBatch


def select_targets(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The one place of the shift.

    Args:
        batch: (B, N) tokens and targets.

    Returns:
        For each of the T targets, row by row: its row (T,), the position of the hidden state that predicts it (T,), one
        before the target, and its token id (T,).

    Raises:
        ValueError: if the first token of a row is a target: nothing precedes it.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    if not tokens.is_cuda and bool(targets[:, 0].any()):
        raise ValueError("targets[:, 0] is true in some row, but nothing precedes a first token that could predict it")
    rows, before = targets[:, 1:].nonzero(as_tuple=True)
    return rows, before, tokens[rows, before + 1]


def check_ids(tokens: Tensor, vocabulary: int | None) -> None:
    """Check that every token id is in the vocabulary.

    Args:
        tokens: (B, N) token ids.
        vocabulary: entries of the vocabulary; None if unknown.

    Raises:
        ValueError: if a token id is outside of the vocabulary.
    """
    # On a GPU the comparison would stall the queue at every step; there, the data module's check stands alone.
    if vocabulary is not None and not tokens.is_cuda and tokens.numel() and int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"a token id is {int(tokens.max())}, but the model's vocabulary has {vocabulary} entries: "
            "give the backbone as many as the tokenizer has"
        )
