"""One text, two tokenizers: where each token ends, in characters.

A position of the anchor sees the augment's tokens that end at or before its own end. The end-of-sequence token counts as one
character behind the text: a position that has yet to predict it must not see that the other model has reached it.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_align.calm.spec import AugmentInput
from lightning_align.data.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def char_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of ids, and the number of its characters that are complete with each id.

    Args:
        tokenizer: theirs.
        ids: of one row, without padding.
    """
    text = tokenizer.decode(ids)
    ends: list[int] = []
    for count in range(1, len(ids) + 1):
        # The first bytes of a character decode to a replacement; until its last byte it is not there.
        whole = tokenizer.decode(ids[:count]).rstrip(_INCOMPLETE)
        ends.append(max(len(whole), ends[-1] if ends else 0))
    if ids and ids[-1] == tokenizer.eos_id:
        ends[-1] = len(text) + 1
    return text, ends


def realign(ids: Sequence[int], tokenizer: Tokenizer, other: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """Encode a row again with another tokenizer.

    Args:
        ids: of one row, without padding.
        tokenizer: theirs.
        other: the augment's.

    Returns:
        Ids of the other tokenizer, their ends, and the ends of ``ids``.
    """
    text, ends = char_ends(tokenizer, ids)
    (encoding,) = other.encode_batch([text])
    other_ids, other_ends = list(encoding.ids), [end for _, end in encoding.offsets]
    if other.bos_id is not None:
        other_ids, other_ends = [other.bos_id, *other_ids], [0, *other_ends]
    if ids and ids[-1] == tokenizer.eos_id:
        other_ids, other_ends = [*other_ids, other.eos_id], [*other_ends, len(text) + 1]
    return other_ids, other_ends, ends


def realign_batch(tokens: Tensor, mask: Tensor, tokenizer: Tokenizer, other: Tokenizer) -> AugmentInput:
    """What an augment with its own tokenizer reads of a batch.

    Args:
        tokens: (B, N) ids of the anchor, padded on the right.
        mask: (B, N) bool.
        tokenizer: the anchor's.
        other: the augment's.
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
