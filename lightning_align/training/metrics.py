"""Metrics from exact sums and counts: the same number for any batch size, accumulation and number of ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class _ExactMetric(Metric):
    """Keeps its float64 states where the module around it is converted, as `precision: bf16-true` does.

    Updates are not in place: a state that `Trainer.validate` reset, in inference mode, could not be updated in a later fit.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)

    def compute_and_reset(self) -> Any:
        """Return the value over all ranks and start again."""
        value = self.compute()
        self.reset()
        return value


class TokenNLL(_ExactMetric):
    """Negative log-likelihood a token, and what follows from it.

    From sums of log-probs, so a logit gap of any size stays finite: taking the logarithm of a softmax gives infinity at
    a gap of 110.
    """

    nll: Tensor
    tokens: Tensor
    bytes_nll: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        for name in ("nll", "tokens", "bytes_nll", "num_bytes"):
            # float64: after 2^24 tokens a float32 count no longer counts.
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor, num_bytes: Tensor | None = None) -> None:
        """Add rows.

        Args:
            sums: (B,) log-probs in nats.
            counts: (B,) tokens.
            num_bytes: (B,) UTF-8 bytes that the tokens spell, where known.
        """
        nll = -sums.detach().double().sum()
        self.nll = self.nll + nll
        self.tokens = self.tokens + counts.sum()
        if num_bytes is not None:
            self.bytes_nll = self.bytes_nll + nll
            self.num_bytes = self.num_bytes + num_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        """`loss` (nats a token), `perplexity`, and `bits_per_byte` where bytes are known; empty before any token."""
        if not bool(self.tokens > 0):
            return {}
        loss = self.nll / self.tokens
        values = {"loss": loss, "perplexity": loss.exp()}
        if bool(self.num_bytes > 0):
            values["bits_per_byte"] = self.bytes_nll / self.num_bytes / math.log(2)
        return {name: value.float() for name, value in values.items()}


class PairMeans(_ExactMetric):
    """Means over pairs of any number of named values."""

    sums: Tensor
    count: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        """Start at zero.

        Args:
            names: of the values, all of which every update gives.
        """
        super().__init__()
        self.names = names
        self.add_state("sums", default=torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: dict[str, Tensor]) -> None:
        """Add pairs.

        Args:
            values: (B,) for each name.
        """
        stacked = torch.stack([values[name].detach().double() for name in self.names])
        self.sums = self.sums + stacked.sum(dim=1)
        self.count = self.count + stacked.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """The mean of each name; empty before any pair."""
        if not bool(self.count > 0):
            return {}
        return dict(zip(self.names, (self.sums / self.count).float().unbind(), strict=True))


class Correlation(_ExactMetric):
    """Pearson's correlation of two values a pair."""

    moments: Tensor

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        # Count, sums, sums of squares, sum of products.
        self.add_state("moments", default=torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add pairs.

        Args:
            first: (B,).
            second: (B,).
        """
        x, y = first.detach().double(), second.detach().double()
        sums = [part.sum() for part in (torch.ones_like(x), x, y, x * x, y * y, x * y)]
        self.moments = self.moments + torch.stack(sums)

    def compute(self) -> Tensor:
        """The correlation; NaN where one of the two does not vary."""
        count, x, y, xx, yy, xy = self.moments.unbind()
        variances = torch.stack([count * xx - x * x, count * yy - y * y])
        # What rounding makes of a constant is no variance.
        varies = variances > 1e-12 * count * torch.stack([xx, yy])
        value = (count * xy - x * y) / variances.clamp(min=0).sqrt().prod()
        return value.where(varies.all(), torch.nan).float()
