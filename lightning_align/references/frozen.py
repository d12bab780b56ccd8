"""References that do not change: a frozen copy, or the policy with its adapters off."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from lightning_align.models.composed import copy_policy
from lightning_align.models.lora import lora_disabled
from lightning_align.runtime.modes import evaluating
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, TokenBatch


def move_to(model: nn.Module, device: torch.device) -> None:
    """Move a model that is not registered in a module, so that Lightning does not move it."""
    if any(weight.device != device for weight in model.parameters()):  # some may be shared with a policy that was moved
        model.to(device)


class FrozenCopy:
    """A frozen copy of the policy. It stays in evaluation mode, so it has no dropout."""

    def __init__(self, model: nn.Module) -> None:
        """Use a model as the reference.

        Args:
            model: A copy of the policy (see `frozen_copy`). It is frozen in place and must not be used elsewhere.
        """
        self.model = model.requires_grad_(False).eval()

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `Reference`. The model moves to the device of the batch."""
        move_to(self.model, batch["tokens"].device)
        with torch.no_grad():
            return response_logprobs(self.model, batch)


def frozen_copy(policy: nn.Module, *, share: bool = True) -> FrozenCopy:
    """Freeze a copy of a policy. Call it before sharding, because sharded modules cannot be copied.

    Args:
        policy: The policy.
        share: Whether the copy shares the frozen models of a composed policy. False if the copy will be sharded.
    """
    return FrozenCopy(copy_policy(policy, share=share))


class AdaptersOff:
    """The policy with its LoRA adapters off. It costs no memory, and is exact if only adapters train."""

    def __init__(self, disabled: Callable[[nn.Module], AbstractContextManager[None]] = lora_disabled) -> None:
        """Set how adapters are switched off.

        Args:
            disabled: A context manager that switches a model's adapters off. Default is `lora_disabled`.
        """
        self.disabled = disabled

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `Reference`. The policy is in evaluation mode while it scores, and then in its earlier mode."""
        with evaluating(policy), self.disabled(policy):
            return response_logprobs(policy, batch)
