"""The interfaces of reference policies."""

from typing import Protocol, runtime_checkable

from torch import nn

from lightning_align.references.average import Average
from lightning_align.types import LogProbs, TokenBatch


class Reference(Protocol):
    """A reference policy, which scores batches.

    A frozen reference is held outside of the module tree. So it is never in a checkpoint, in an optimizer or in train mode:
    ``parameters()``, ``state_dict()``, ``train()`` and ``to()`` of its module do not reach it.
    """

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """Score the responses, without gradients.

        Args:
            policy: The policy that trains. A reference may share its weights.
            batch: (B, N) rows.

        Returns:
            (B,) sums of log-probs, in nats, and (B,) numbers of tokens.
        """
        ...


@runtime_checkable
class MovingReference(Reference, Protocol):
    """A reference that follows the policy. The module registers ``average``, which is its state."""

    average: "Average"

    def update(self, policy: nn.Module, *, alpha: float) -> None:
        """Move the reference q towards the policy p: q <- alpha p + (1 - alpha) q."""
        ...

    def restore(self, policy: nn.Module) -> None:
        """Use the average that was loaded from a checkpoint. Called once, after loading."""
        ...
