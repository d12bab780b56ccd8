"""References that follow the policy: a second model, or a second set of adapters.

A moving reference is a weighted average of earlier policies, ``q <- a p + (1 - a) q`` every t optimizer steps: TR-DPO
(Gorbatovski et al. 2024, arXiv 2404.09656). A hard copy (a = 1) and an exponential moving average (t = 1) are special cases.
The average cannot be computed again from the initial checkpoint, so the module registers it and saves it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lightning_align.models.composed import copy_policy, trained_part
from lightning_align.models.lora import LoRAConfig, add_lora, lora_layers, using_lora
from lightning_align.references.average import Average, copy_weights, reshard
from lightning_align.references.frozen import move_to
from lightning_align.references.protocol import MovingReference
from lightning_align.runtime.modes import evaluating
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, TokenBatch

REFERENCE_SCOPE = "reference"
"""The LoRA scope of a moving reference."""


class MovingCopy:
    """A second model that follows the policy. If the policy has fewer bits than float32, its average is a third model."""

    def __init__(self, model: nn.Module) -> None:
        """Use a model as the initial reference.

        Args:
            model: A copy of the policy, in the policy's dtype. It must not be used elsewhere.
        """
        self.model = model.requires_grad_(False)
        self.average = Average(trained_part(model))

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `Reference`."""
        move_to(self.model, batch["tokens"].device)
        with evaluating(self.model):
            return response_logprobs(self.model, batch)

    def update(self, policy: nn.Module, *, alpha: float) -> None:
        """See `MovingReference`."""
        self.average.follow(trained_part(policy), alpha=alpha)
        self.restore(policy)

    def restore(self, policy: nn.Module) -> None:
        """See `MovingReference`."""
        copy_weights(self.average.model, trained_part(self.model))


class MovingAdapters:
    """A second LoRA scope of the policy that follows the scope that trains. It costs only the memory of the adapters.

    The matrices A and B are averaged separately, because they are what trains. Their product is not the average of products.
    """

    def __init__(self, policy: nn.Module, config: LoRAConfig) -> None:
        """Add the scope as a copy of the scope that trains. It is active only while the reference scores.

        Args:
            policy: The policy with the adapters of ``config``. Changed in place, before any sharding.
            config: The configuration of the adapters that train.
        """
        self.scope = config.scope
        add_lora(policy, replace(config, scope=REFERENCE_SCOPE), active=False)
        adapters = _adapters(policy, REFERENCE_SCOPE).requires_grad_(False)
        copy_weights(_adapters(policy, self.scope), adapters)
        self.average = Average(copy.deepcopy(adapters))

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `Reference`."""
        with evaluating(policy), using_lora(policy, REFERENCE_SCOPE):
            return response_logprobs(policy, batch)

    def update(self, policy: nn.Module, *, alpha: float) -> None:
        """See `MovingReference`."""
        reshard(policy)
        self.average.follow(_adapters(policy, self.scope), alpha=alpha)
        self.restore(policy)

    def restore(self, policy: nn.Module) -> None:
        """See `MovingReference`."""
        reshard(policy)
        copy_weights(self.average.model, _adapters(policy, REFERENCE_SCOPE))


def _adapters(policy: nn.Module, scope: str) -> nn.ModuleDict:
    """Return the adapters of a scope by layer name, with slashes for dots: a ModuleDict allows no dots in names."""
    return nn.ModuleDict({name.replace(".", "/"): layer.lora[scope] for name, layer in lora_layers(policy, scope)})


def moving_reference(
    policy: nn.Module,
    *,
    lora: LoRAConfig | None = None,
    share: bool = True,
    convert: Callable[[nn.Module], nn.Module] = lambda model: model,
    shard: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> MovingReference:
    """Make a moving reference that starts equal to the policy: a second scope if only adapters train, else a second model.

    The caller registers ``average`` in the module that is saved, and calls `restore` after a checkpoint may have been loaded.

    Args:
        policy: The policy with its adapters, not yet sharded.
        lora: The configuration of the adapters, if only adapters train.
        share: Whether the second model shares the frozen models of a composed policy. False if it will be sharded.
        convert: Converts a model to the precision that the policy will have.
        shard: Shards a model as the policy will be sharded.
    """
    if lora is not None:
        adapters = MovingAdapters(policy, lora)
        shard(adapters.average)
        return adapters
    reference = MovingCopy(convert(copy_policy(policy, share=share)))
    shard(reference.model)
    if reference.average.model is not trained_part(reference.model):
        shard(reference.average)
    return reference
