"""Alignment of one text under two tokenizers, by the number of characters up to the end of each token.

A position of the anchor sees the augment's tokens that end at or before its own end. The end-of-sequence token counts as one
character after the text. Without this, the position that predicts it would see that the augment has already reached it.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_align.calm.spec import AugmentInput
from lightning_align.data.tokenizer import Tokenizer, all_ends

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def char_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """Decode a row and count the characters that are complete after each token.

    Args:
        tokenizer: The tokenizer that produced the ids.
        ids: The token ids of one row, without padding.

    Returns:
        The text, and for each token the number of characters up to and including it.
    """
    text = tokenizer.decode(ids)
    ends: list[int] = []
    for count in range(1, len(ids) + 1):
        # The first bytes of a character decode to a replacement character. The character counts from its last byte on.
        complete = tokenizer.decode(ids[:count]).rstrip(_INCOMPLETE)
        ends.append(max(len(complete), ends[-1] if ends else 0))
    if ids and ids[-1] in all_ends(tokenizer):
        ends[-1] = len(text) + 1
    return text, ends


def realign(ids: Sequence[int], tokenizer: Tokenizer, other: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """Encode a row again with another tokenizer.

    Args:
        ids: The token ids of one row, without padding.
        tokenizer: The tokenizer that produced the ids.
        other: The augment's tokenizer.

    Returns:
        The ids of the other tokenizer, the character ends of these ids, and the character ends of ``ids``.
    """
    text, ends = char_ends(tokenizer, ids)
    (encoding,) = other.encode_batch([text])
    other_ids, other_ends = list(encoding.ids), [end for _, end in encoding.offsets]
    if other.bos_id is not None:
        other_ids, other_ends = [other.bos_id, *other_ids], [0, *other_ends]
    if ids and ids[-1] in all_ends(tokenizer):
        other_ids, other_ends = [*other_ids, other.eos_id], [*other_ends, len(text) + 1]
    return other_ids, other_ends, ends


def realign_batch(tokens: Tensor, mask: Tensor, tokenizer: Tokenizer, other: Tokenizer) -> AugmentInput:
    """Encode a batch again for an augment that has its own tokenizer.

    Args:
        tokens: (B, N) token ids of the anchor, padded on the right.
        mask: (B, N) bool, true at real tokens.
        tokenizer: The anchor's tokenizer.
        other: The augment's tokenizer.

    Returns:
        The augment's tokens, padded on the right, with the character ends of both models' tokens.
    """
    rows = [row[: int(length)].tolist() for row, length in zip(tokens.cpu(), mask.sum(dim=1), strict=True)]
    parts = [realign(row, tokenizer, other) for row in rows]
    pad = partial(_pad, device=tokens.device)
    lengths = torch.tensor([len(ids) for ids, _, _ in parts], device=tokens.device)
    ids = pad([ids for ids, _, _ in parts], max(1, int(lengths.max())), other.pad_id)
    ends = pad([ends for _, ends, _ in parts], ids.shape[1], 0)
    anchor_ends = pad([ends for _, _, ends in parts], tokens.shape[1], 0)
    return AugmentInput(ids, torch.arange(ids.shape[1], device=tokens.device) < lengths[:, None], ends, anchor_ends)


def _pad(rows: Sequence[Sequence[int]], width: int, value: int, *, device: torch.device) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
