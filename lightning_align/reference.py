"""Reference policies: what a policy is compared with, and must not move with.

A frozen reference is never in a checkpoint, in an optimizer or in train mode: it is held outside of the module tree,
where none of ``parameters()``, ``state_dict()``, ``train()`` and ``to()`` of its owner can reach it.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from lightning_align.logprobs import response_logprobs
from lightning_align.models.lora import lora_disabled
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


class FrozenCopy:
    """A copy of the policy as it was when this was made.

    It is frozen in the parameters and in evaluation mode for good, so that dropout in the policy does not reach it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a model as the reference.

        Args:
            model: not used elsewhere: it is frozen in place. Give a copy of a policy (see `frozen_copy`).
        """
        self.model = model.requires_grad_(False).eval()

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `Reference`. The model follows the batch to its device; it cannot be moved by its owner."""
        weight = next(self.model.parameters(), None)
        if weight is not None and weight.device != batch["tokens"].device:
            self.model.to(batch["tokens"].device)
        with torch.no_grad():
            return response_logprobs(self.model, batch)


def frozen_copy(policy: nn.Module) -> FrozenCopy:
    """Freeze a copy of a policy. Before any sharding: sharded modules cannot be copied."""
    return FrozenCopy(copy.deepcopy(policy))


class AdaptersOff:
    """The policy itself with its LoRA adapters off, which costs no memory; exact while only adapters train."""

    def __init__(self, disabled: Callable[[nn.Module], AbstractContextManager[None]] = lora_disabled) -> None:
        """Choose how adapters are switched off.

        Args:
            disabled: context that switches a model's adapters off; by default that of `lightning_align.models.lora`.
        """
        self.disabled = disabled

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `Reference`. The policy is in evaluation mode meanwhile, each part of it in its own mode afterwards."""
        modes = {module: module.training for module in policy.modules()}
        policy.eval()
        try:
            with torch.no_grad(), self.disabled(policy):
                return response_logprobs(policy, batch)
        finally:
            for module, training in modes.items():
                module.training = training
