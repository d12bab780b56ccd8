"""What retrieval is worth: bits per byte with its neighbours, without, and with wrong ones, on the same tokens.

A gain over OFF says that reading helps; a gain over RANDOM that it is what was found that helps; and intervals over documents
say whether other documents would have shown it too.
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics import Metric

ALPHAS = (0.125, 0.25, 0.5, 1.0)
"""Overlaps up to which bits per byte are reported, as in the paper's figure 6."""
RESAMPLES = 2000


class RetrievalArms(Metric):
    """Bits per byte of each arm: over everything, over chunks of small overlap, and its distance from the first arm."""

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, arms: Sequence[str]) -> None:
        """Start with nothing.

        Args:
            arms: A names, the first of which the others are compared with.
        """
        super().__init__()
        self.arms = tuple(arms)
        # A window a row, since the number of documents is not known: document, tokens, and for each overlap the bytes and
        # the nats of each arm.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # The states stay float64 where the module around them is converted.
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)

    def update(self, nats: Tensor, targets: Tensor, documents: Tensor, overlap: Tensor, chunk_bytes: Tensor, size: int) -> None:
        """Add windows.

        Args:
            nats: (A, B, N) negative log-likelihood of each target by each arm, 0 elsewhere.
            targets: (B, N) bool.
            documents: (B,).
            overlap: (B, C) of each chunk.
            chunk_bytes: (B, C).
            size: tokens of a chunk.
        """
        chunk = torch.arange(targets.shape[1], device=targets.device) // size
        per_chunk = nats.double().new_zeros(*nats.shape[:2], overlap.shape[1]).index_add_(2, chunk, nats.detach().double())
        values = torch.cat((chunk_bytes.double()[None], per_chunk))  # (1 + A, B, C)
        edges = torch.tensor(ALPHAS[:-1], device=overlap.device)
        bins = torch.bucketize(overlap.float(), edges)  # (B, C): the first alpha that is not below
        summed = values.new_zeros(*values.shape[:2], len(ALPHAS)).scatter_add_(2, bins.expand_as(values).contiguous(), values)
        heads = torch.stack((documents.double(), targets.sum(1).double()), dim=1)
        self.rows.append(torch.cat((heads, summed.transpose(0, 1).flatten(1)), dim=1))

    def compute(self) -> dict[str, float]:
        """What the windows add up to; empty before any window.

        Returns:
            By arm ``arm/bits_per_byte``, ``arm/bits_per_byte_alpha_0.125`` and so on; ``arm/gain``, the bits per byte that the
            first arm saves over it, with its 95 % interval ``arm/gain_low`` and ``arm/gain_high``; of the first arm ``loss``
            (nats a token); and ``documents``, ``bytes_alpha_0.125`` and so on.
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
                if not math.isnan(value):  # there may be no chunk of so small an overlap
                    values[f"{arm}/bits_per_byte_alpha_{alpha}"] = value
            if index:
                gain = (nats[:, index] - nats[:, 0]).sum(1) / math.log(2)
                low, high = interval(gain, num_bytes.sum(1))
                values[f"{arm}/gain"] = float(gain.sum() / num_bytes.sum())
                values[f"{arm}/gain_low"], values[f"{arm}/gain_high"] = low, high
        return values


def interval(bits: Tensor, num_bytes: Tensor) -> tuple[float, float]:
    """95 % interval of sum(bits) / sum(bytes) over other draws of the documents: a percentile bootstrap.

    Args:
        bits: (D,) of each document.
        num_bytes: (D,).

    Returns:
        The 2.5th and the 97.5th percentile.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(bits), (RESAMPLES, len(bits)), generator=generator)
    ratios = bits[drawn].sum(1) / num_bytes[drawn].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return low, high
