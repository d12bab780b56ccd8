"""Rows whose common beginnings are computed once, as one sequence of tokens without padding.

Both rows of a pair begin with the same prompt, as do all answers of a group. In a causal model the hidden states of equal
beginnings are equal, so one computation serves all rows: a row takes the hidden states of its beginning from the row before
it, and goes on with its own tokens, whose attention sees the whole row. What is shared is found from the tokens alone. It may
go beyond the prompt where answers begin alike, and ends before it where a tokenizer merged the end of the prompt with the
answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_align.models.attention import Attend
from lightning_align.models.documents import probe_rows
from lightning_align.models.unpadded import Unpadded, has_unpadded, unpadded_batch
from lightning_align.models.varlen import Kernel, Segments, VarlenAttention
from lightning_align.runtime.transfer import to_device
from lightning_align.runtime.untraced import untraced
from lightning_align.types import TokenBatch

Indices = NDArray[np.int64]
WORTH = 0.1
"""The smallest share of saved tokens that is worth it. Attention to keys in two places takes some time of its own."""
_faults: "WeakKeyDictionary[nn.Module, dict[str, str | None]]" = WeakKeyDictionary()
"""What `prefix_fault` has found, by model and type of device, whose kernels differ."""


class PrefixPlan:
    """Which tokens of a batch are computed, and where each row finds its hidden states. It is made on the host.

    The rows are sorted by their tokens, so that the longest beginning that a row shares with any row before it is the one that
    it shares with its neighbor. No smaller number of tokens would do.
    """

    def __init__(self, tokens: Indices, widths: Sequence[int], *, worth: float = 0.0) -> None:
        """Find the common beginnings.

        Args:
            tokens: (B, N) token ids.
            widths: The number of leading tokens of each row whose hidden states are needed, at least 1 and at most N.
            worth: The smallest share of saved tokens with which the plan is followed.
        """
        self.worth = worth
        self.places: Indices = np.zeros(tokens.shape, dtype=np.int64)
        """(B, N) the index of each token among the T computed ones. 0 behind the width of a row."""
        self.total = 0
        """The number of computed tokens T."""
        self.num_separate = sum(widths)
        """The number of tokens of separate rows."""
        self.own: list[int] = []
        """The number of computed tokens of each row, in the order in which they are computed."""
        self.rows: list[int] = []
        """The rows in this order, and the width of each."""
        self.widths: list[int] = []
        first: list[Indices] = []
        before, shared_with = -1, 0
        # Of big-endian numbers, the order of the bytes is that of the numbers.
        keys = [tokens[row, :width].astype(">u8").tobytes() for row, width in enumerate(widths)]
        for row in sorted(range(len(widths)), key=keys.__getitem__):
            width, shared = widths[row], 0
            if before >= 0:
                shared = min(width, shared_with)
                differing = np.flatnonzero(tokens[row, :shared] != tokens[before, :shared])
                shared = int(differing[0]) if len(differing) else shared
                self.places[row, :shared] = self.places[before, :shared]
            own = width - shared
            self.places[row, shared:width] = np.arange(self.total, self.total + own)
            first.append(row * tokens.shape[1] + np.arange(shared, width))
            self.own.append(own)
            self.rows.append(row)
            self.widths.append(width)
            self.total += own
            before, shared_with = row, width
        self.where: Indices = np.concatenate(first)
        """(T,) the index of each computed token in the B N columns."""

    @property
    def saved(self) -> float:
        """The share of the tokens of separate rows that need not be computed."""
        return 1 - self.total / self.num_separate

    def keys(self) -> tuple[list[int], Indices]:
        """Return the number of keys of each row with tokens of its own, and the index of each key among the T tokens."""
        chosen = [(row, width) for row, width, own in zip(self.rows, self.widths, self.own, strict=True) if own]
        return [width for _, width in chosen], np.concatenate([self.places[row, :width] for row, width in chosen])


@untraced  # torch.compile cannot trace NumPy's strings of bytes
def plan_prefixes(batch: TokenBatch, *, worth: float = WORTH) -> PrefixPlan:
    """Find the common beginnings of the rows of a batch on the CPU.

    The tokens after the last target of a row are not computed, because no target depends on them.

    Args:
        batch: (B, N) tokens and targets.
        worth: The smallest share of saved tokens with which the plan is followed.
    """
    targets = batch["targets"].numpy()
    # The last target is predicted by the token before it, so that as many tokens are read as come before it.
    last = targets.shape[1] - 1 - targets[:, ::-1].argmax(axis=1)
    widths = np.where(targets.any(axis=1), last, 0).clip(min=1)
    return PrefixPlan(batch["tokens"].numpy(), widths.tolist(), worth=worth)


@dataclass
class SharedRows(Unpadded):
    """The T tokens of (B, N) rows that are computed, each once. ``segments`` are the tokens that are each row's own."""

    places: Tensor
    """(B, N) int64 index of each token of the rows among the T."""
    keys: Segments
    """The keys of each row: all its tokens."""
    sources: Tensor
    """(K,) int64 index of each key among the T tokens."""

    @classmethod
    def planned(cls, tokens: Tensor, plan: PrefixPlan) -> "SharedRows":
        """Take the tokens that a plan says.

        Args:
            tokens: (B, N) int64 token ids, those of the plan.
            plan: The plan.
        """
        device = tokens.device
        where = to_device(plan.where, device)
        lengths, sources = plan.keys()
        return cls(
            tokens=tokens.flatten().index_select(0, where),
            positions=where % tokens.shape[1],
            segments=Segments.of_lengths([own for own in plan.own if own], device),
            where=where,
            shape=(tokens.shape[0], tokens.shape[1]),
            places=to_device(plan.places, device),
            keys=Segments.of_lengths(lengths, device),
            sources=to_device(sources, device),
        )

    def index(self, rows: Tensor, columns: Tensor) -> Tensor:
        """See `Unpadded.index`. Several rows may have the same index."""
        return self.places[rows, columns]

    def padded(self, x: Tensor) -> Tensor:
        """Return values in their rows, with those of some token as padding: (T, ...) -> (B, N, ...)."""
        return x[self.places]

    def attention(self, kernel: Kernel) -> Attend:
        """See `Unpadded.attention`."""
        return _SharedAttention(self.sources, VarlenAttention(self.segments, self.keys, True, kernel))


@dataclass
class _SharedAttention:
    """The attention of each row's own tokens to the whole row, whose keys are gathered."""

    sources: Tensor
    attend: VarlenAttention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float) -> Tensor:
        """See `Attend`."""
        k, v = k.index_select(0, self.sources), v.index_select(0, self.sources)
        return self.attend(q, k, v, scale=scale, dropout=dropout)


def computed_rows(model: nn.Module, batch: TokenBatch) -> Unpadded | None:
    """Return the tokens of a batch that are computed: with shared beginnings, without padding, or None for padded rows.

    Args:
        model: Any language model.
        batch: (B, N) tokens.
    """
    shared = None if batch.get("prefixes") is None else shared_rows(model, batch)
    return shared or unpadded_batch(model, batch)


@untraced  # torch.compile cannot trace the arrays of a plan
def shared_rows(model: nn.Module, batch: TokenBatch) -> SharedRows | None:
    """Return the tokens of a batch with a plan of its common beginnings, or None if its rows are to be computed apart.

    They are if the batch has no plan or would save too little, or if the model does not compute shared beginnings exactly.

    Args:
        model: Any language model.
        batch: (B, N) tokens, with ``prefixes`` if rows may share them.
    """
    plan = batch.get("prefixes")
    if plan is None:
        return None
    # First, because a model may have to find it out in a forward pass, in which all ranks of a sharded model take part.
    if prefix_fault(model) is not None or not has_unpadded(model, batch["tokens"].device, max(plan.widths)):
        return None
    return SharedRows.planned(batch["tokens"], plan) if plan.saved >= plan.worth else None


@untraced  # as above; its rows are no rows of a batch
def prefix_fault(model: nn.Module) -> str | None:
    """Return why a model does not compute rows with shared beginnings as it computes separate rows, or None if it does.

    The first call computes a few rows both ways, and logs why they are computed apart.

    Args:
        model: Any language model. Its mode and the state of the random numbers do not change. Of a view of other models, such
            as one with other adapters, these are asked: ``computed_by``.
    """
    if (parts := getattr(model, "computed_by", None)) is not None:
        faults = [prefix_fault(part) for part in parts]
        return next((fault for fault in faults if fault is not None), None)
    device, found = next(model.parameters()).device, _faults.setdefault(model, {})
    if device.type not in found:
        found[device.type] = fault = _probe(model, device)
        inner: Any = getattr(model, "model", model)
        if fault is not None:
            rank_zero_info(f"{type(inner).__name__}: The prompts of pairs are computed once per answer, because {fault}.")
    return found[device.type]


def _probe(model: nn.Module, device: torch.device) -> str | None:
    if not has_unpadded(model, device, 1):
        return "the model cannot compute rows without their padding"

    def shared(tokens: Tensor, lengths: list[int]) -> Tensor:
        untyped: Any = model
        rows = SharedRows.planned(tokens, PrefixPlan(tokens.cpu().numpy(), lengths))
        hidden: Tensor = untyped.unpadded_hidden(rows)
        return rows.padded(hidden)

    return probe_rows(model, shared)
