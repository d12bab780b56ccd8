"""Groups of batch rows of similar length."""

import torch
from torch import Tensor

from lightning_align.runtime.ranks import world
from lightning_align.types import TokenBatch

# Maximum number of groups. A model without a packed layout runs once per group.
LENGTH_GROUPS = 4


def targets_of(group: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Select the targets of a group of rows.

    Args:
        group: (G,) row indices of the group.
        rows: (T,) row index of each target of the batch.
        num_rows: The number of rows of the batch.

    Returns:
        For each target of the group, its row within the group, and its index among all T targets.
    """
    place = rows.new_full((num_rows,), -1)
    place[group] = torch.arange(len(group))
    chosen = (place[rows] >= 0).nonzero().squeeze(1)
    return place[rows[chosen]], chosen


def length_groups(batch: TokenBatch) -> list[tuple[Tensor, int]]:
    """Group the rows of a batch by length.

    The grouping saves time on a CPU, where padding costs as much as tokens. There are no groups in these cases:

    - On a GPU, where reading the lengths would stall the queue.
    - On several ranks, because all ranks of a sharded model must run the same number of forward passes.
    - If the groups would save less than 10 % of the positions.

    Returns:
        For each group, its row indices, and the number of leading positions that predict its targets. The model is causal,
        so the positions after them are not needed. Empty if the batch should not be split.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    if tokens.device.type != "cpu" or not tokens.numel() or world()[1] > 1:
        return []
    widths = (targets * torch.arange(tokens.shape[1])).amax(dim=1).clamp(min=1)
    groups = [(group, int(widths[group[-1]])) for group in widths.argsort(stable=True).chunk(LENGTH_GROUPS)]
    return groups if sum(len(group) * width for group, width in groups) <= 0.9 * tokens.numel() else []
