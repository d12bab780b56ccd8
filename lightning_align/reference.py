"""Reference policies: what a policy is compared with, and the callback that moves those which move.

A frozen reference is never in a checkpoint, in an optimizer or in train mode: it is held outside of the module tree,
where none of ``parameters()``, ``state_dict()``, ``train()`` and ``to()`` of its owner can reach it.

A moving one is a weighted average of policies past, ``q <- a p + (1 - a) q`` every t optimizer steps: TR-DPO (Gorbatovski
et al. 2024, arXiv 2404.09656), of which a hard copy (a = 1) and an exponential moving average (t = 1) are cases. It
cannot be made again from the file that the run began with, so its average is registered in its owner and saved.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from ema_pytorch import EMA
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_align.logprobs import response_logprobs
from lightning_align.models.lora import LoRAConfig, add_lora, lora_disabled, lora_layers, using_lora
from lightning_align.types import LogProbs, TokenBatch

REFERENCE_SCOPE = "reference"
"""The LoRA scope of a moving reference."""


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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the length of a block, then each part of the model in its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _follow(model: nn.Module, device: torch.device) -> None:
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
        _follow(self.model, batch["tokens"].device)
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
        with _evaluating(policy), self.disabled(policy):
            return response_logprobs(policy, batch)


class Average(nn.Module):
    """Weights in at least float32 that go towards others: bfloat16 has no room for a step of 0.1 %.

    They stay so where the module around them is converted, as ``precision: bf16-true`` does, and train by no optimizer.
    """

    def __init__(self, model: nn.Module) -> None:
        """Begin where a model is.

        Args:
            model: kept, and frozen, if it is in float32 or float64; else copied.
        """
        super().__init__()
        narrow = [p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
        self.model = (copy.deepcopy(model).float() if narrow else model).requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def widest(tensor: Tensor) -> Tensor:
            to = fn(tensor)
            return tensor.to(to.device, torch.promote_types(tensor.dtype, to.dtype))

        super()._apply(widest, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without types
        return self

    @torch.no_grad()
    def follow(self, model: nn.Module, *, alpha: float) -> None:
        """Go the share ``alpha`` of the way to a model of the same weights.

        Raises:
            ValueError: if ``alpha`` is out of range, or a weight of either model has no partner in the other: left out in
                silence, it would stay where it was for good.
        """
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it is the share of the way to the policy, above 0 and at most 1")
        _gather_none(self.model, model)
        own, theirs = _tensors(self.model), _tensors(model)
        if [(name, value.shape) for name, value in own] != [(name, value.shape) for name, value in theirs]:
            has, lacks = ({f"{name} {tuple(value.shape)}" for name, value in side} for side in (own, theirs))
            raise ValueError(
                f"the reference cannot follow the policy: the policy has {_some(lacks - has)} and the reference has "
                f"{_some(has - lacks)} that the other has not. Rename or add layers before the module is configured, and "
                "compile with `model.compile()`, which keeps the names"
            )
        # Made anew each time, since it cannot be copied or pickled, and used for nothing but one step: its own `update` would
        # copy the policy for its first 100 calls, whatever `beta` is.
        ema = EMA(model, ema_model=self.model, beta=1 - alpha, include_online_model=False, coerce_dtype=True, use_foreach=True)
        ema.update_moving_average(self.model, model, 1 - alpha)
        for (_, mine), (_, other) in zip(own, theirs, strict=True):
            if not mine.is_floating_point():
                mine.copy_(other)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + f" and {len(names) - 3} more" * (len(names) > 3) or "nothing"


def _gather_none(*models: nn.Module) -> None:
    """Back to shards: after a forward pass FSDP2 leaves the root's weights gathered."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all weights, in the target's dtype."""
    if source is target:
        return
    _gather_none(source, target)
    for (_, mine), (_, other) in zip(_tensors(target), _tensors(source), strict=True):
        mine.copy_(other)


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
        _follow(self.model, batch["tokens"].device)
        with _evaluating(self.model):
            return response_logprobs(self.model, batch)

    def update(self, policy: nn.Module, *, alpha: float) -> None:
        """See `MovingReference`."""
        self.average.follow(policy, alpha=alpha)
        self.restore(policy)

    def restore(self, policy: nn.Module) -> None:
        """See `MovingReference`."""
        _copy_weights(self.average.model, self.model)


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
        _copy_weights(_adapters(policy, self.scope), adapters)
        self.average = Average(copy.deepcopy(adapters))

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `Reference`."""
        with _evaluating(policy), using_lora(policy, REFERENCE_SCOPE):
            return response_logprobs(policy, batch)

    def update(self, policy: nn.Module, *, alpha: float) -> None:
        """See `MovingReference`."""
        _gather_none(policy)
        self.average.follow(_adapters(policy, self.scope), alpha=alpha)
        self.restore(policy)

    def restore(self, policy: nn.Module) -> None:
        """See `MovingReference`."""
        _gather_none(policy)
        _copy_weights(self.average.model, _adapters(policy, REFERENCE_SCOPE))


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


class ReferenceUpdate(Callback):
    """Moves the reference of a module towards its policy: q <- a p + (1 - a) q, every so many optimizer steps.

    For any module with a ``policy`` and a ``reference`` that can move (see `MovingReference`). It counts the steps that the
    optimizer really took: neither micro-batches nor what a gradient scaler skipped. The count is in the checkpoint.
    """

    def __init__(self, *, alpha: float = 0.6, every: int = 512) -> None:
        """Choose the rule; the defaults are those of TR-DPO.

        Args:
            alpha: share of the way to go: 1 copies the policy; with `every` 1, 1 - alpha is the decay of an exponential moving
                average.
            every: optimizer steps from one update to the next.

        Raises:
            ValueError: if a number is out of range.
        """
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it is the share of the way to the policy, above 0 and at most 1")
        if every < 1:
            raise ValueError(f"every is {every}; it counts optimizer steps, at least 1")
        self.alpha, self.every = alpha, every
        self.steps = 0
        """Steps that the optimizer took so far."""
        self._handle: RemovableHandle | None = None
        self._stepping = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the optimizer.

        Raises:
            ValueError: if the module has no reference that moves.
        """
        module: Any = pl_module
        reference = getattr(module, "reference", None)
        if not isinstance(reference, MovingReference):
            raise ValueError(
                f"ReferenceUpdate: the reference of {type(module).__name__} is {type(reference).__name__}, which does not "
                "move: give the module `reference: moving`, or leave the callback out"
            )

        def step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if not self._stepping:
                return
            self._stepping = False
            self.steps += 1
            if self.steps % self.every == 0:
                module.reference.update(module.policy, alpha=self.alpha)

        # A hook of the optimizer: Lightning has none after its step, and counts a step that the gradient scaler skipped.
        self._handle = trainer.optimizers[0].register_step_post_hook(step)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Expect a step: torch takes some of its own, with gradients of 0, to save or load the state of a sharded optimizer."""
        self._stepping = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """The count of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.steps = state_dict["steps"]
