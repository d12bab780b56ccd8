"""Tokens per second and the share of padding."""

import math
import time

import torch
from torch import Tensor


class Throughput:
    """Counts tokens between two logged steps. Validation does not count."""

    def __init__(self) -> None:
        """Start with nothing counted and the clock stopped."""
        self._tokens = self._cells = torch.zeros((), dtype=torch.long)
        self._start, self._step = math.nan, 0

    def count(self, mask: Tensor) -> None:
        """Count a batch, on its device and without waiting for it.

        Args:
            mask: (B, N) bool, true at real tokens.
        """
        self._tokens = self._tokens + mask.sum()
        self._cells = self._cells + mask.numel()

    def stop(self) -> None:
        """Stop the clock: the next interval is not reported."""
        self._start = math.nan

    def restart(self, device: torch.device) -> None:
        """Forget what was counted and start the clock."""
        self._tokens = self._cells = torch.zeros((), dtype=torch.long, device=device)
        self._start = time.perf_counter()

    def report(self, step: int, *, world_size: int, device: torch.device) -> dict[str, Tensor]:
        """Return the numbers of the interval that ends at a step, and start the next interval.

        Args:
            step: The optimizer step; a second call for the same step reports nothing.
            world_size: The number of ranks, each of which is taken to be as fast as this one.
            device: Where batches are.

        Returns:
            ``train/tokens_per_second`` (real tokens, over all ranks) and ``train/padding_share``. Empty if the clock was
            stopped.
        """
        if step == self._step:
            return {}
        self._step = step
        start, tokens, cells = self._start, self._tokens, self._cells
        self.restart(device)
        if math.isnan(start):
            return {}
        rate, padding = tokens * world_size / (self._start - start), 1 - tokens / cells
        return {"train/tokens_per_second": rate.float(), "train/padding_share": padding.float()}
