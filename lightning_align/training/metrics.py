"""Metrics with exact sums and counts: equal for any batch size, accumulation and number of ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class LoaderMetric(Metric):
    """A metric over all rows of an evaluation that has a part over the rows of each loader, if there are several."""

    def __init__(self) -> None:
        """Start at zero, without parts."""
        super().__init__()
        self._parts: dict[int, Self] = {}

    def part(self, loader: int) -> Self:
        """Return the metric over the rows of a loader.

        Args:
            loader: The number of the loader, from 0.
        """
        if loader not in self._parts:
            # A clone has the parts of the original.
            part = self._parts[loader] = cast("Self", self.clone())
            part._parts = {}
            part.reset()
        return self._parts[loader].to(self.device)


class _ExactMetric(LoaderMetric):
    """Keeps its float64 states when the module around it is converted, as with `precision: bf16-true`.

    Updates are not in place. A state that was reset in inference mode, by `Trainer.validate`, could not be updated in place
    in a later fit.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)


class TokenNLL(_ExactMetric):
    """Negative log-likelihood per token, perplexity, and bits per byte.

    Computed from sums of log-probs, so it is finite for logit gaps of any size. The logarithm of a softmax is infinite at a gap
    of 110.
    """

    nll: Tensor
    tokens: Tensor
    bytes_nll: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        for name in ("nll", "tokens", "bytes_nll", "num_bytes"):
            # float64, because a float32 count stops at 2^24 tokens.
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor, num_bytes: Tensor | None = None) -> None:
        """Add the rows of a batch.

        Args:
            sums: (B,) sums of log-probs in nats.
            counts: (B,) numbers of tokens.
            num_bytes: (B,) numbers of UTF-8 bytes in the text of these tokens, if known.
        """
        nll = -sums.detach().double().sum()
        self.nll = self.nll + nll
        self.tokens = self.tokens + counts.sum()
        if num_bytes is not None:
            self.bytes_nll = self.bytes_nll + nll
            self.num_bytes = self.num_bytes + num_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` (nats per token), `perplexity`, and `bits_per_byte` if bytes are known. Empty before any token."""
        if not bool(self.tokens > 0):
            return {}
        loss = self.nll / self.tokens
        values = {"loss": loss, "perplexity": loss.exp()}
        if bool(self.num_bytes > 0):
            values["bits_per_byte"] = self.bytes_nll / self.num_bytes / math.log(2)
        return {name: value.float() for name, value in values.items()}


class PairMeans(_ExactMetric):
    """Means of named values over pairs."""

    sums: Tensor
    count: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        """Start at zero.

        Args:
            names: The names of the values. Every update must have all of them.
        """
        super().__init__()
        self.names = names
        self.add_state("sums", default=torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: dict[str, Tensor]) -> None:
        """Add the pairs of a batch.

        Args:
            values: (B,) values for each name.
        """
        stacked = torch.stack([values[name].detach().double() for name in self.names])
        self.sums = self.sums + stacked.sum(dim=1)
        self.count = self.count + stacked.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each name. Empty before any pair."""
        if not bool(self.count > 0):
            return {}
        return dict(zip(self.names, (self.sums / self.count).float().unbind(), strict=True))


class Correlation(_ExactMetric):
    """Pearson correlation of two values per pair."""

    moments: Tensor

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        # Count, sums, sums of squares, sum of products.
        self.add_state("moments", default=torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add the pairs of a batch.

        Args:
            first: (B,) first values.
            second: (B,) second values.
        """
        x, y = first.detach().double(), second.detach().double()
        sums = [part.sum() for part in (torch.ones_like(x), x, y, x * x, y * y, x * y)]
        self.moments = self.moments + torch.stack(sums)

    def compute(self) -> Tensor:
        """Return the correlation, or NaN if one of the two values is constant."""
        count, x, y, xx, yy, xy = self.moments.unbind()
        variances = torch.stack([count * xx - x * x, count * yy - y * y])
        # The variance of a constant is not exactly 0, because of rounding.
        varies = variances > 1e-12 * count * torch.stack([xx, yy])
        value = (count * xy - x * y) / variances.clamp(min=0).sqrt().prod()
        return value.where(varies.all(), torch.nan).float()
