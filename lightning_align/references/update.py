"""The callback that moves a reference."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_align.references.protocol import MovingReference


class ReferenceUpdate(Callback):
    """Moves the reference q of a module towards its policy p: q <- alpha p + (1 - alpha) q, every ``every`` optimizer steps.

    It works with any module that has a ``policy`` and a ``reference`` that can move (see `MovingReference`), and with the
    opponent `ema` of SPINModule. It counts optimizer steps, not micro-batches or steps that a gradient scaler skipped. The
    count is saved in checkpoints.

    The further options are those of ema-pytorch, with the same names, so that its keyword arguments can be given as they are.
    With `inv_gamma`, the decay 1 - alpha of the update after optimizer step k grows with k:

        decay(k) = 1 - (1 + n / inv_gamma)^(-power),   n = k - update_after_step - 1,

    limited to the range from `min_value` to 1 - `alpha`.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.6,
        every: int = 512,
        update_after_step: int = 0,
        inv_gamma: float | None = None,
        power: float = 2 / 3,
        min_value: float = 0.0,
        beta: float | None = None,
        update_every: int | None = None,
    ) -> None:
        """Set the rule. The defaults are those of TR-DPO.

        Args:
            alpha: The share of the way to the policy. 1 copies the policy. With `every` 1, 1 - alpha is the decay of an
                exponential moving average.
            every: The number of optimizer steps between updates.
            update_after_step: Until this optimizer step, each update copies the policy. Default is 0.
            inv_gamma: The pace of the warm-up of the decay. A larger value is slower. Default is no warm-up.
            power: The power of the warm-up. Default is 2/3.
            min_value: The smallest decay during the warm-up. Default is 0.
            beta: The final decay, instead of `alpha`, which is then 1 - `beta`. Default is to use `alpha`.
            update_every: Another name for `every`, which it replaces. Default is to use `every`.

        Raises:
            ValueError: If a number is out of range.
        """
        if beta is not None:
            if not 0 <= beta < 1:
                raise ValueError(
                    f"`beta` must be at least 0 and below 1, but got {beta}. With 1 the average would never move: remove the "
                    "callback, and use a reference that does not move."
                )
            alpha = 1 - beta
        every = every if update_every is None else update_every
        if not 0 < alpha <= 1:
            raise ValueError(f"`alpha` must be above 0 and at most 1, but got {alpha}: the share of the way to the policy.")
        if every < 1:
            raise ValueError(f"`every` must be at least 1, but got {every}. It counts optimizer steps.")
        if update_after_step < 0:
            raise ValueError(f"`update_after_step` must be at least 0, but got {update_after_step}. It counts optimizer steps.")
        if inv_gamma is not None and not inv_gamma > 0:
            raise ValueError(f"`inv_gamma` must be above 0, or null for no warm-up, but got {inv_gamma}.")
        if not power > 0:
            raise ValueError(f"`power` must be above 0, but got {power}.")
        if not 0 <= min_value <= 1 - alpha:
            raise ValueError(f"`min_value` must be from 0 to the final decay 1 - `alpha` = {1 - alpha:g}, but got {min_value}.")
        self.alpha, self.every = alpha, every
        self.update_after_step, self.inv_gamma, self.power, self.min_value = update_after_step, inv_gamma, power, min_value
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
            setting = "opponent: ema" if hasattr(module, "opponent") else "reference: moving"
            raise ValueError(
                f"ReferenceUpdate: the reference of {type(module).__name__} is a {type(reference).__name__}, which does not "
                f"move. Set `{setting}` in the module, or remove the callback."
            )

        def step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if not self._stepping:
                return
            self._stepping = False
            self.steps += 1
            if self.steps % self.every == 0:
                module.reference.update(module.policy, alpha=self.alpha_at(self.steps))

        # Lightning has no hook after the optimizer step, and it counts steps that the gradient scaler skipped.
        self._handle = trainer.optimizers[0].register_step_post_hook(step)

    def alpha_at(self, step: int) -> float:
        """Return the share of the way to the policy of the update after an optimizer step, counted from 1."""
        if step <= self.update_after_step:
            return 1.0
        if self.inv_gamma is None:
            return self.alpha
        since = step - self.update_after_step - 1
        if not since:
            return 1.0  # whatever `min_value` is, as in ema-pytorch
        decay: float = 1 - (1 + since / self.inv_gamma) ** -self.power
        return 1 - min(max(decay, self.min_value), 1 - self.alpha)

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
