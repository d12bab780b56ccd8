"""A learning-rate schedule that YAML can write: warm up, hold, decay."""

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupDecay(LRScheduler):
    """Linear warm-up to the optimizer's learning rate, then constant, then decay to a fraction of it."""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        warmup_steps: int = 0,
        decay: Literal["none", "linear", "cosine"] = "cosine",
        decay_from: float = 0.0,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        """Steps are optimizer steps.

        Args:
            optimizer: whose learning rates are the peaks.
            total_steps: step at which the decay ends; the rate stays there afterwards. Give the run's `max_steps`.
            warmup_steps: steps of linear warm-up.
            decay: shape of the decay.
            decay_from: share of `total_steps` up to which the rate is held; 0 decays from the end of the warm-up.
            final: share of the peak that is left at the end.
            last_epoch: for resuming by hand, as in torch.

        Raises:
            ValueError: if the numbers do not describe a schedule.
        """
        if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                f"WarmupDecay: total_steps is {total_steps} and warmup_steps {warmup_steps}; the total must be at "
                "least 1 and the warm-up no longer than it"
            )
        if not 0 <= decay_from < 1 or not 0 <= final <= 1:
            raise ValueError(
                f"WarmupDecay: decay_from is {decay_from} and final {final}; the first must be in [0, 1), the second in [0, 1]"
            )
        if decay not in ("none", "linear", "cosine"):
            raise ValueError(f"WarmupDecay: decay is {decay!r}; it must be 'none', 'linear' or 'cosine'")
        self.total_steps, self.warmup_steps, self.final, self.decay = total_steps, warmup_steps, final, decay
        self.decay_start = max(warmup_steps, int(decay_from * total_steps))
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """Share of the peak at an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "none" or step < self.decay_start:
            return 1.0
        done = min(1.0, (step - self.decay_start) / max(1, self.total_steps - self.decay_start))
        left = 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * left

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the parameter groups now."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the step of a state, by this schedule's own settings: the optimizer's state is to be loaded before.

        Args:
            state_dict: of a schedule of this class, whatever its settings.
        """
        own = {name: getattr(self, name) for name in ("total_steps", "warmup_steps", "decay", "decay_start", "final")}
        super().load_state_dict({**state_dict, **own})
        if any(state_dict.get(name) != value for name, value in own.items()):
            # The optimizer brought the rate of the old settings, which after a decay that was over is 0.
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            self._last_lr = self.get_lr()
