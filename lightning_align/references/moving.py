"""Reference policies: what a policy is compared with, and the callback that moves those which move.

A frozen reference is never in a checkpoint, in an optimizer or in train mode: it is held outside of the module tree,
where none of ``parameters()``, ``state_dict()``, ``train()`` and ``to()`` of its owner can reach it.

A moving one is a weighted average of policies past, ``q <- a p + (1 - a) q`` every t optimizer steps: TR-DPO (Gorbatovski
et al. 2024, arXiv 2404.09656), of which a hard copy (a = 1) and an exponential moving average (t = 1) are cases. It
cannot be made again from the file that the run began with, so its average is registered in its owner and saved.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lightning_align.models.lora import LoRAConfig, add_lora, lora_layers, using_lora
from lightning_align.references.average import Average, copy_weights, reshard
from lightning_align.references.frozen import evaluating, move_to
from lightning_align.references.protocol import MovingReference
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, TokenBatch

REFERENCE_SCOPE = "reference"
"""The LoRA scope of a moving reference."""


class MovingCopy:
    """A second model that follows the policy. Where the policy is narrower than float32, its average is a third one."""

    def __init__(self, model: nn.Module) -> None:
        """Take a model as the reference to begin with.

        Args:
            model: what scores, in the policy's dtype; not used elsewhere. Give a copy of the policy.
        """
        self.model = model.requires_grad_(False)
        self.average = Average(model)

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `Reference`."""
        move_to(self.model, batch["tokens"].device)
        with evaluating(self.model):
            return response_logprobs(self.model, batch)

    def update(self, policy: nn.Module, *, alpha: float) -> None:
        """See `MovingReference`."""
        self.average.follow(policy, alpha=alpha)
        self.restore(policy)

    def restore(self, policy: nn.Module) -> None:
        """See `MovingReference`."""
        copy_weights(self.average.model, self.model)


class MovingAdapters:
    """A second LoRA scope of the policy that follows the one that trains: a reference that moves, at the cost of adapters.

    What is averaged are the adapters' matrices, as what trains is; their product is then not the average of products.
    """

    def __init__(self, policy: nn.Module, config: LoRAConfig) -> None:
        """Add the scope, equal to the one that trains, and out of use but when the reference scores.

        Args:
            policy: with the adapters of ``config``; changed in place, before any sharding.
            config: of the adapters that train.
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
    """The adapters of a scope by the names of their layers (which a ModuleDict cannot hold with their dots)."""
    return nn.ModuleDict({name.replace(".", "/"): layer.lora[scope] for name, layer in lora_layers(policy, scope)})


def moving_reference(
    policy: nn.Module,
    *,
    lora: LoRAConfig | None = None,
    convert: Callable[[nn.Module], nn.Module] = lambda model: model,
    shard: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> MovingReference:
    """A reference that begins as the policy and can move: a second scope where only adapters train, else a second model.

    Its maker registers its ``average`` in the module that is saved, and calls `restore` once a checkpoint may be loaded.

    Args:
        policy: built, with its adapters, and not yet sharded.
        lora: the adapters that train, if only they do.
        convert: to the precision that the policy will have.
        shard: as the policy will be.
    """
    if lora is not None:
        adapters = MovingAdapters(policy, lora)
        shard(adapters.average)
        return adapters
    reference = MovingCopy(convert(copy.deepcopy(policy)))
    shard(reference.model)
    if reference.average.model is not reference.model:
        shard(reference.average)
    return reference
