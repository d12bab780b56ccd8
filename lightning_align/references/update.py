"""The callback that moves a reference."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_align.references.protocol import MovingReference


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
