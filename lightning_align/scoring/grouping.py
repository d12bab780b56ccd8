"""Rows of a batch in groups of about one length."""

import torch
from torch import Tensor

from lightning_align.runtime.ranks import world
from lightning_align.types import TokenBatch

# Groups of rows of about one length that a model without a packed layout is run on, one after the other.
LENGTH_GROUPS = 4


def targets_of(group: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The targets of a group of rows: for each its row within the group, and its number among all targets."""
    place = rows.new_full((num_rows,), -1)
    place[group] = torch.arange(len(group))
    chosen = (place[rows] >= 0).nonzero().squeeze(1)
    return place[rows[chosen]], chosen


def length_groups(batch: TokenBatch) -> list[tuple[Tensor, int]]:
    """Rows of about one length, and the positions that score their targets: causality makes the others superfluous.

    On a CPU a pad costs what a token costs. On a GPU looking at lengths would stall the queue, and of a sharded model
    every rank must run the same number of forward passes: there, and where it would save less than a tenth, no groups.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    if tokens.is_cuda or not tokens.numel() or world()[1] > 1:
        return []
    widths = (targets * torch.arange(tokens.shape[1])).amax(dim=1).clamp(min=1)
    groups = [(group, int(widths[group[-1]])) for group in widths.argsort(stable=True).chunk(LENGTH_GROUPS)]
    return groups if sum(len(group) * width for group, width in groups) <= 0.9 * tokens.numel() else []
