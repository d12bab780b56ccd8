"""References that do not change: a frozen copy, or the policy with its adapters off."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from lightning_align.models.lora import lora_disabled
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, TokenBatch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the length of a block, then each part of the model in its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def move_to(model: nn.Module, device: torch.device) -> None:
    """Move a model that no owner moves."""
    weight = next(model.parameters(), None)
    if weight is not None and weight.device != device:
        model.to(device)


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
        move_to(self.model, batch["tokens"].device)
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
        with evaluating(policy), self.disabled(policy):
            return response_logprobs(policy, batch)
