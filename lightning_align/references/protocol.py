"""What a reference policy offers."""

from typing import Protocol, runtime_checkable

from torch import nn

from lightning_align.references.average import Average
from lightning_align.types import LogProbs, TokenBatch


class Reference(Protocol):
    """Log-probs of a batch under the reference."""

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """Score the responses, without gradients.

        Args:
            policy: the policy that trains; a reference may be a part of it.
            batch: (B, N).
        """
        ...


@runtime_checkable
class MovingReference(Reference, Protocol):
    """A reference that follows the policy. Its owner registers ``average``, which is its state."""

    average: "Average"

    def update(self, policy: nn.Module, *, alpha: float) -> None:
        """Go the share ``alpha`` of the way to the policy: q <- a p + (1 - a) q."""
        ...

    def restore(self, policy: nn.Module) -> None:
        """Score with the average that was loaded from a checkpoint; once, after the loading."""
        ...
