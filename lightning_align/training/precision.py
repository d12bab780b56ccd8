"""How a module holds its weights: their dtype, and the ranks that they are sharded over."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_align.models.activations import ActivationSwitch, Checkpointing
from lightning_align.models.causality import check_causal
from lightning_align.models.deferred import build_deferred, fill, is_deferred, recipes_kept
from lightning_align.models.head_probe import probe_head
from lightning_align.models.parallelize import shard, within_forward
from lightning_align.models.pretrained_shards import pretrained_parts
from lightning_align.models.tensor_parallel import AXIS, split_model
from lightning_align.models.weights import weights_hash
from lightning_align.runtime.lightning_internals import ResumedModule, accumulates, trainer_of
from lightning_align.runtime.memory import device_memory
from lightning_align.runtime.ranks import everyone, set_copies
from lightning_align.runtime.team import of_first_rank
from lightning_align.training.gradient import lower_scale
from lightning_align.training.masters import MasterWeights, warn_of_lost_updates

GRADIENT_SHARE = 1 / 8
"""The share of a GPU's memory that the whole gradient may take. A larger one is sharded after each micro-batch."""


class PrecisionHooks(ResumedModule):
    """The part of `AlignModule` that depends on the precision and on the sharding of the Trainer."""

    tensor_parallel: ClassVar[bool] = False
    """Whether the policy may be split over ranks that train on the same rows."""
    policy: nn.Module

    def __init__(self, activation_checkpointing: Checkpointing = False) -> None:
        """Start without a Trainer."""
        super().__init__()
        self.activations = ActivationSwitch(activation_checkpointing)
        self.masters = MasterWeights()
        self._scale_is_set = False
        self._syncs_once = False

    def setup(self, stage: str) -> None:
        """Keep the numbers of batches in their dtype.

        ``bf16-true`` would round stored log-probs, which are sums of hundreds of nats, to 8 bits.
        """
        self.activations.end()  # an earlier run may have ended with an error in the middle of a step
        set_copies(1)  # an earlier run may have been split
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, HalfPrecision):
            plugin.convert_input = lambda data: data  # type: ignore[method-assign]

    # -- sharding

    @property
    def is_sharded(self) -> bool:
        """Whether the strategy shards the policy over ranks (FSDP2)."""
        trainer = trainer_of(self)
        return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)

    @property
    def data_mesh(self) -> Any:
        """The device mesh of the ranks that the policy is sharded over."""
        assert self.device_mesh is not None
        return self.device_mesh["data_parallel"]

    @property
    def mixed_dtype(self) -> torch.dtype | None:
        """The dtype of matrix products if the Trainer's precision is a mixed one, else None."""
        trainer = trainer_of(self)
        plugin = None if trainer is None else trainer.precision_plugin
        if not isinstance(plugin, MixedPrecision):
            return None
        return torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16

    def convert_like_policy(self, model: nn.Module) -> nn.Module:
        """Convert a model that is not registered here to the precision that Lightning gives the policy."""
        trainer = trainer_of(self)
        if trainer is None:
            return model
        with recipes_kept(model) as made:
            made.append(trainer.precision_plugin.convert_module(model))
        return made[0]

    def shard_policy(self, policy: nn.Module) -> nn.Module:
        """Shard a model over the ranks, with gathers in the dtype of a mixed precision, and make its deferred weights.

        Raises:
            ValueError: If it is to be split by tensor parallelism and cannot be; see `split_model`.
        """
        assert self.device_mesh is not None
        parts = self.device_mesh[AXIS]
        set_copies(parts.size())
        if parts.size() > 1:
            if not self.tensor_parallel:
                raise ValueError(
                    f"tensor_parallel_size must be 1 for {type(self).__name__}, but got {parts.size()}. SFTModule and "
                    "DPOModule support it. Shard other modules with data_parallel_size."
                )
            policy = split_model(policy, parts)
            if self.data_mesh.size() == 1:
                return policy
        device = self.trainer.strategy.root_device
        fill(policy, lambda model: shard(model, self.data_mesh, dtype=self.mixed_dtype), device)
        return policy

    def shard_like_policy(self, model: nn.Module) -> nn.Module:
        """Shard a model by itself if the policy is sharded. Otherwise every rank would hold all of it."""
        return self.shard_policy(model if is_deferred(model) else model.to(self.device)) if self.is_sharded else model

    def build_for_sharding(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Build a model: without its large weights if it will be sharded, so that no rank holds all of them.

        Tensor parallelism splits whole weights.
        """
        deferred = self.is_sharded and self.device_mesh is not None and self.device_mesh[AXIS].size() == 1
        return build_deferred(build) if deferred else build()

    def check_sharded(self, policy: nn.Module) -> None:
        """Do the checks of a build that need weights, on a sharded policy that was built without. This is a collective."""
        with self.trainer.precision_plugin.forward_context():
            for part in pretrained_parts(policy):
                # The ranks agree: each might find other rounding.
                part.take_probe(of_first_rank(within_forward(policy, partial(probe_head, part))))
            check_causal(policy)

    def hash_once(self, model: nn.Module) -> str:
        """Hash the weights of a model on rank 0, and tell the others: all of them have the same."""
        trainer = trainer_of(self)
        if trainer is None or trainer.world_size == 1:
            return weights_hash(model)
        return of_first_rank(weights_hash(model) if trainer.is_global_zero else "")

    # -- gradients

    def on_train_start(self) -> None:
        """Warn of weights that are too coarse to train, and choose how gradients are accumulated over micro-batches."""
        warn_of_lost_updates(self.trainer.optimizers, sharded=self.is_sharded)
        self._scale_is_set = self.trainer.global_step > 0
        if self.is_sharded and self.trainer.world_size > 1:
            self._syncs_once = everyone(gradient_fits(self.policy, self.device), self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Checkpoint activations, and reduce the gradients of a sharded policy only after the last micro-batch of a batch."""
        self.activations.start(self.policy)
        if self._syncs_once and isinstance(self.policy, FSDPModule):
            self.policy.set_requires_gradient_sync(not accumulates(self.trainer))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the checkpointing of activations."""
        self.activations.end()

    def fit_scale(self, count: Tensor | int) -> None:
        """Lower the first loss scale of ``16-mixed`` by the count that a summed loss is larger than its mean.

        Args:
            count: The number of tokens or pairs of the first micro-batch of the run.
        """
        trainer = trainer_of(self)
        if self._scale_is_set or trainer is None:
            return
        self._scale_is_set = True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            most = torch.as_tensor(count, dtype=torch.float32, device=self.device)
            lower_scale(scaler, float(trainer.strategy.reduce(most, reduce_op="max")))

    def on_after_backward(self) -> None:
        """Add the gradients of narrow weights in float32. DDP must find those of all micro-batches in the weights."""
        if self.trainer.world_size == 1:
            self.masters.collect()


def gradient_fits(policy: nn.Module, device: torch.device) -> bool:
    """Return whether the device can hold the whole gradient of a sharded policy between micro-batches.

    Without a reduction after each micro-batch, each rank accumulates the gradient of all trained weights, in float32.
    """
    memory = None if device.type == "cpu" else device_memory(device)
    if memory is None:
        return True
    needed = 4 * sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    return needed <= GRADIENT_SHARE * memory
