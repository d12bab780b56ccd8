"""Training without a Trainer: in a loop of Fabric, or in a plain loop of torch."""

from types import SimpleNamespace
from typing import Any, Final

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align.models.activations import Checkpointing
from lightning_align.models.dropout import DropoutSwitch
from lightning_align.runtime.lightning_internals import trainer_of
from lightning_align.runtime.ranks import world
from lightning_align.runtime.untraced import untraced
from lightning_align.training.gradient import BatchMean, gradients_of
from lightning_align.training.precision import PrecisionHooks

GIVEN: Final = {
    "accumulate_grad_batches": 1,
    "callbacks": (),
    "current_epoch": 0,
    "datamodule": None,
    "log_every_n_steps": 0,
    "num_sanity_val_batches": (1,),
    "num_test_batches": (1,),
    "num_val_batches": (1,),
    "precision": "as in the loop",
    "sanity_checking": False,
    "state": SimpleNamespace(fn=None),
    "testing": False,
    "training": True,
    "validating": False,
}
"""What a module reads of a Trainer, as it is in a loop that logs nothing and has one loader."""


class NoTrainer:
    """Stands in for the Trainer of a module that has none, and names what only a Trainer can give."""

    def __init__(self, owner: str) -> None:
        """Begin at step 0.

        Args:
            owner: The name of the module's class, for messages.
        """
        self.owner, self.global_step = owner, 0

    @property
    def world_size(self) -> int:
        """The number of ranks that gradients are averaged over."""
        return world()[1]

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return world()[0] == 0

    def total(self, count: Tensor) -> Tensor:
        """Sum a scalar over the ranks."""
        count = count.clone()
        dist.all_reduce(count)
        return count

    def __getattr__(self, name: str) -> Any:
        """Return a constant of the loop.

        Raises:
            RuntimeError: If only a Trainer has it.
        """
        if name in GIVEN:
            return GIVEN[name]
        if name.startswith("__"):
            raise AttributeError(name)
        # Not an AttributeError: torch would take it for a missing property of the module, and hide the message.
        raise RuntimeError(
            f"{self.owner} needs a Trainer for this, because it uses `trainer.{name}`. Call `lightning.Trainer(...).fit`. "
            "Without a Trainer, call `training_step`, `validation_step` and `average_gradients` only."
        )


class LoopByHand(PrecisionHooks):
    """The part of `AlignModule` with which a loop without a Trainer gets the same gradients.

    A training step returns a sum over tokens or pairs. A Trainer calls the hook that divides the gradient by their number in
    the whole optimizer batch. A loop by hand calls `average_gradients`:

        module.configure_model()
        optimizer = torch.optim.AdamW(module.policy.parameters(), lr=1e-4)
        for micro_batches in optimizer_batches:
            for index, batch in enumerate(micro_batches):
                output = module.training_step(batch, index)
                (output["loss"] if isinstance(output, dict) else output).backward()
            module.average_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()
    """

    policy: nn.Module
    dropout: DropoutSwitch
    batch_mean: BatchMean

    def __init__(self, activation_checkpointing: Checkpointing = False) -> None:
        """Start without a loop."""
        super().__init__(activation_checkpointing)
        self._no_trainer: NoTrainer | None = None

    @property
    def by_hand(self) -> bool:
        """Whether the module has no Trainer."""
        return trainer_of(self) is None

    @property
    def trainer(self) -> L.Trainer:
        """The Trainer, or what stands in for it in a loop without one."""
        found: Any = trainer_of(self)
        if found is None:
            self._no_trainer = found = self._no_trainer or NoTrainer(type(self).__name__)
        trainer: L.Trainer = found
        return trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        untyped: Any = L.LightningModule.trainer
        untyped.fset(self, trainer)

    @untraced  # torch.compile cannot trace Lightning's logging
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a value through the Trainer or Fabric. A plain loop has no logger."""
        if not (self.by_hand and self.fabric is None):
            super().log(name, value, *args, **kwargs)

    @untraced  # as above
    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """Log values as `log` does."""
        if not (self.by_hand and self.fabric is None):
            super().log_dict(dictionary, *args, **kwargs)

    def begin_by_hand(self) -> None:
        """Prepare a training step without a Trainer. Every training step must call this first. With a Trainer, hooks do it.

        Raises:
            ValueError: If the policy is not built, its weights are missing, or a setting needs a Trainer.
        """
        if not self.by_hand:
            return
        if self.policy is None:
            raise ValueError(
                f"{type(self).__name__} has no policy yet. Call `configure_model()` before the optimizer is made, or train "
                "with a Trainer, which calls it."
            )
        if self.trainer.global_step == 0:
            self.check_by_hand()
        self.activations.start(self.policy)
        self.dropout.start(self.policy)

    def begin_trial(self) -> None:
        """Prepare a copy of a module whose steps are only timed. The checks of a first step are left to the run."""
        loop: Any = self.trainer
        loop.global_step = 1

    def check_by_hand(self) -> None:
        """Raise if a setting needs a Trainer. Subclasses add to it."""

    def weighted(self, loss_sum: Tensor, count: Tensor | int) -> Tensor:
        """Return a summed loss from a training step, and count what it is a sum over.

        Args:
            loss_sum: Scalar, the sum over the tokens or pairs of the micro-batch.
            count: How many tokens or pairs there were. The gradient is divided by their total over the optimizer batch.
        """
        self.fit_scale(count)
        self.batch_mean.add(count)
        return loss_sum

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the number of tokens or pairs in the optimizer batch, in a loop without a Trainer.

        Call it after the backward passes of all micro-batches, before gradients are clipped and before ``optimizer.step()``.
        With several ranks, gradients must have been averaged over the ranks, as DDP and FSDP2 do.

        Args:
            optimizer: The optimizer, also one that Fabric has set up.

        Raises:
            ValueError: If the module has a Trainer, whose hooks divide.
        """
        if not self.by_hand:
            raise ValueError(
                "`average_gradients` must be called in a loop without a Trainer only, but this module has one, which calls "
                "the hook that divides. Remove the call."
            )
        loop: Any = self.trainer
        self.batch_mean.average(
            gradients_of(optimizer),
            accumulated=1,
            world_size=loop.world_size,
            total=loop.total,
            device=next((p.device for p in self.policy.parameters()), torch.device("cpu")),
        )
        self.activations.end()
        self.dropout.end()
        loop.global_step += 1
