"""Rows of a batch without their padding, as one sequence of tokens.

30 to 40 % of a preference batch is padding, which costs as much as tokens do. A model with ``unpadded_hidden`` computes the
tokens alone. The lengths of the rows are known on the host, from the loader, so that no step waits for a device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.models.attention import Attend
from lightning_align.models.varlen import Kernel, Segments, VarlenAttention
from lightning_align.types import TokenBatch


@dataclass
class Unpadded:
    """The T real tokens of (B, N) rows, row by row. The rows may hold several documents each."""

    tokens: Tensor
    """(T,) int64 token ids."""
    positions: Tensor
    """(T,) int64 positions, from 0 in each document."""
    segments: Segments
    """The documents."""
    where: Tensor
    """(T,) int64 index of each token in the B N columns."""
    shape: tuple[int, int]
    """The shape (B, N) of the rows."""

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor, segments: Segments) -> "Unpadded":
        """Leave the padding out.

        Args:
            tokens: (B, N) int64 token ids.
            mask: (B, N) bool, true at real tokens.
            segments: The rows, or the documents if rows hold several, one after the other.
        """
        flat = mask.flatten()
        # Lengths of another batch must not be used without a word.
        torch._assert_async(flat.sum() == segments.total)
        where = first_true(flat, segments.total)
        places = torch.arange(segments.total, device=tokens.device)
        positions = places - segments.spread(segments.starts[:-1].long())
        return cls(tokens.flatten().index_select(0, where), positions, segments, where, (tokens.shape[0], tokens.shape[1]))

    def select(self, x: Tensor) -> Tensor:
        """Leave the padding out of other values of the rows: (B, N, ...) -> (T, ...)."""
        return x.flatten(0, 1).index_select(0, self.where)

    def padded(self, x: Tensor) -> Tensor:
        """Return values in their rows, with zeros as padding: (T, ...) -> (B, N, ...)."""
        rows, columns = self.shape
        flat = x.new_zeros(rows * columns, *x.shape[1:]).index_copy(0, self.where, x)
        return flat.view(rows, columns, *x.shape[1:])

    def attention(self, kernel: Kernel) -> Attend:
        """Return the attention of each document to itself, for layers on (T, ...).

        Args:
            kernel: What computes it, from `choose_kernel`.
        """
        return VarlenAttention(self.segments, self.segments, True, kernel)

    def index(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the index among the T tokens of given rows and columns, (M,) each, which must not be padding."""
        total, size = len(self.where), self.shape[0] * self.shape[1]
        places = self.where.new_zeros(size).index_copy(0, self.where, torch.arange(total, device=self.where.device))
        return places.index_select(0, rows * self.shape[1] + columns)


def unpadded_batch(model: nn.Module, batch: TokenBatch) -> Unpadded | None:
    """Return the tokens of a batch without padding, or None if the padded rows are to be computed.

    These are: rows on a CPU, where `PaLM` has a path of its own; rows whose lengths the loader did not count; rows without
    padding; and models that cannot compute tokens alone.

    Args:
        model: Any language model.
        batch: (B, N) tokens.
    """
    tokens, lengths = batch["tokens"], batch.get("lengths")
    # First, because a model may have to find it out in a forward pass, in which all ranks of a sharded model take part.
    if tokens.device.type == "cpu" or lengths is None or not has_unpadded(model, tokens.device, max(lengths, default=0)):
        return None
    if "document_ids" not in batch and sum(lengths) == tokens.numel():
        return None
    return Unpadded.of(tokens, batch["mask"], Segments.of_lengths(lengths, tokens.device))


def has_unpadded(model: nn.Module, device: torch.device, longest: int) -> bool:
    """Return whether a model computes documents without padding between them, on a device.

    Args:
        model: Any language model. It does if it has ``unpadded_hidden``, and ``longest_unpadded(device)``, the number of tokens
            of the longest document that it computes so, is not None and large enough.
        device: The device of the tokens.
        longest: The number of tokens of the longest document.
    """
    limit: Any = getattr(model, "longest_unpadded", None)
    most = limit(device) if callable(limit) and getattr(model, "router_record", None) is None else None
    return most is not None and longest <= most


def first_true(flags: Tensor, count: int) -> Tensor:
    """Return the indices of true elements without waiting for the device, as `nonzero` would.

    Args:
        flags: (M,) bool.
        count: The number of true elements.

    Returns:
        (count,) int64, in ascending order.
    """
    # A stable sort keeps the order of equal elements. Not every device can sort bool.
    return flags.logical_not().to(torch.uint8).argsort(stable=True)[:count]
