"""The metric that compares retrieval with its controls on the same tokens: bits per byte with and without neighbors.

An arm is one choice of neighbors, such as ON (the retrieved neighbors), OFF (no neighbors) or RANDOM (random chunks). A gain
over OFF shows that neighbors help. A gain over RANDOM shows that the retrieved content helps. The confidence intervals show
whether the gain would hold for another sample of documents.
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from lightning_align.training.metrics import LoaderMetric

ALPHAS = (0.125, 0.25, 0.5, 1.0)
"""Thresholds of the overlap (see `overlaps`) at which bits per byte are reported, as in figure 6 of the paper."""
RESAMPLES = 2000
"""The number of bootstrap samples of `interval`."""


class RetrievalArms(LoaderMetric):
    """Bits per byte of each arm, in total and over chunks of low overlap, and the gain of the first arm over each other arm.

    A metric of torchmetrics. It works across ranks.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, arms: Sequence[str]) -> None:
        """Start with an empty state.

        Args:
            arms: The names of the A arms. The first arm is compared with each of the others.
        """
        super().__init__()
        self.arms = tuple(arms)
        # One row per window, because the number of documents is unknown. The columns are the document, the number of target
        # tokens, and then the bytes and the nats of each arm, each split by overlap.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # Keep the states in float64 when the module that holds the metric is converted.
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)

    def update(self, nats: Tensor, targets: Tensor, documents: Tensor, overlap: Tensor, chunk_bytes: Tensor, size: int) -> None:
        """Add windows.

        Args:
            nats: (A, B, N) negative log-likelihood of each target under each arm, in nats. 0 at positions without a target.
            targets: (B, N) bool, true at targets.
            documents: (B,) number of the document of each window.
            overlap: (B, C) overlap of each chunk with its neighbors, see `overlaps`.
            chunk_bytes: (B, C) UTF-8 bytes of each chunk.
            size: The number of tokens per chunk.
        """
        chunk = torch.arange(targets.shape[1], device=targets.device) // size
        per_chunk = nats.double().new_zeros(*nats.shape[:2], overlap.shape[1]).index_add_(2, chunk, nats.detach().double())
        values = torch.cat((chunk_bytes.double()[None], per_chunk))  # (1 + A, B, C)
        # (B, C) index of the smallest alpha that is at least the overlap. Not `bucketize`: it needs a tensor of the alphas, and
        # to copy that, the host would wait for a GPU.
        bins = torch.stack([overlap.float() > alpha for alpha in ALPHAS[:-1]]).sum(0)
        summed = values.new_zeros(*values.shape[:2], len(ALPHAS)).scatter_add_(2, bins.expand_as(values).contiguous(), values)
        heads = torch.stack((documents.double(), targets.sum(1).double()), dim=1)
        self.rows.append(torch.cat((heads, summed.transpose(0, 1).flatten(1)), dim=1))

    def compute(self) -> dict[str, float]:
        """Compute the metrics over all windows.

        Returns:
            The metrics by name, or an empty dictionary if there were no windows.

            - For each arm: ``arm/bits_per_byte``, and ``arm/bits_per_byte_alpha_0.125`` and so on, over the chunks of at most
              this overlap.
            - For each arm but the first: ``arm/gain``, the bits per byte that the first arm saves over it, and the bounds
              ``arm/gain_low`` and ``arm/gain_high`` of its 95 % interval.
            - For the first arm: ``loss``, in nats per token.
            - ``documents``, the number of documents, and ``bytes_alpha_0.125`` and so on, the bytes of the chunks of at most
              this overlap.
        """
        rows = torch.cat(self.rows).cpu() if isinstance(self.rows, list) and self.rows else self.rows
        if not isinstance(rows, Tensor) or not len(rows):
            return {}
        names, place = torch.unique(rows[:, 0], return_inverse=True)
        totals = rows.new_zeros(len(names), rows.shape[1] - 1).index_add_(0, place, rows[:, 1:])
        summed = rearrange(totals[:, 1:], "d (v a) -> d v a", a=len(ALPHAS))  # (documents, bytes and arms, alphas)
        num_bytes, nats = summed[:, 0], summed[:, 1:]
        values = {"documents": float(len(names)), "loss": float(nats[:, 0].sum() / totals[:, 0].sum())}
        up_to = summed.sum(0).cumsum(-1)
        for alpha, count in zip(ALPHAS, up_to[0].tolist(), strict=True):
            values[f"bytes_alpha_{alpha}"] = count
        for index, arm in enumerate(self.arms):
            bits = up_to[1 + index] / up_to[0] / math.log(2)
            values[f"{arm}/bits_per_byte"] = float(bits[-1])
            for alpha, value in zip(ALPHAS[:-1], bits.tolist(), strict=False):
                if not math.isnan(value):  # NaN if no chunk has an overlap this low
                    values[f"{arm}/bits_per_byte_alpha_{alpha}"] = value
            if index:
                gain = (nats[:, index] - nats[:, 0]).sum(1) / math.log(2)
                low, high = interval(gain, num_bytes.sum(1))
                values[f"{arm}/gain"] = float(gain.sum() / num_bytes.sum())
                values[f"{arm}/gain_low"], values[f"{arm}/gain_high"] = low, high
        return values


def interval(bits: Tensor, num_bytes: Tensor) -> tuple[float, float]:
    """Compute the 95 % confidence interval of sum(bits) / sum(bytes) with a percentile bootstrap over documents.

    Args:
        bits: (D,) bits of each document.
        num_bytes: (D,) UTF-8 bytes of each document.

    Returns:
        The 2.5th and the 97.5th percentile.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(bits), (RESAMPLES, len(bits)), generator=generator)
    ratios = bits[drawn].sum(1) / num_bytes[drawn].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return low, high
