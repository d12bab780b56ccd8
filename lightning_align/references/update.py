"""The callback that moves a reference."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_align.references.protocol import MovingReference


class ReferenceUpdate(Callback):
    """Moves the reference q of a module towards its policy p: q <- alpha p + (1 - alpha) q, every ``every`` optimizer steps.

    It works with any module that has a ``policy`` and a ``reference`` that can move (see `MovingReference`). It counts
    optimizer steps, not micro-batches or steps that a gradient scaler skipped. The count is saved in checkpoints.
    """

    def __init__(self, *, alpha: float = 0.6, every: int = 512) -> None:
        """Set the rule. The defaults are those of TR-DPO.

        Args:
            alpha: The share of the way to the policy. 1 copies the policy. With `every` 1, 1 - alpha is the decay of an
                exponential moving average.
            every: The number of optimizer steps between updates.

        Raises:
            ValueError: If a number is out of range.
        """
        if not 0 < alpha <= 1:
            raise ValueError(f"`alpha` must be above 0 and at most 1, but got {alpha}: the share of the way to the policy.")
        if every < 1:
            raise ValueError(f"`every` must be at least 1, but got {every}. It counts optimizer steps.")
        self.alpha, self.every = alpha, every
        self.steps = 0
        """The number of optimizer steps so far."""
        self._handle: RemovableHandle | None = None
        self._stepping = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Register a hook with the optimizer.

        Raises:
            ValueError: If the module has no reference that can move.
        """
        module: Any = pl_module
        reference = getattr(module, "reference", None)
        if not isinstance(reference, MovingReference):
            raise ValueError(
                f"ReferenceUpdate: the reference of {type(module).__name__} is a {type(reference).__name__}, which does not "
                "move. Set `reference: moving` in the module, or remove the callback."
            )

        def step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if not self._stepping:
                return
            self._stepping = False
            self.steps += 1
            if self.steps % self.every == 0:
                module.reference.update(module.policy, alpha=self.alpha)

        # Lightning has no hook after the optimizer step, and it counts steps that the gradient scaler skipped.
        self._handle = trainer.optimizers[0].register_step_post_hook(step)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Expect a step. Torch also takes steps, with gradients of 0, to save or load the state of a sharded optimizer."""
        self._stepping = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the hook from the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of steps."""
        self.steps = state_dict["steps"]
