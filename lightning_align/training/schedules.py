"""A learning-rate schedule for configurations: warm up, hold, decay."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_RUN_LENGTH: ContextVar[Callable[[], float] | None] = ContextVar("run_length", default=None)


@contextmanager
def run_length(steps: Callable[[], float]) -> Iterator[None]:
    """Tell the schedules that are made in a ``with`` block how long the run is.

    Args:
        steps: Returns the optimizer steps of the run, infinity if nothing limits it. It is called only by schedules that ask,
            because it may have to load the rows.
    """
    token = _RUN_LENGTH.set(steps)
    try:
        yield
    finally:
        _RUN_LENGTH.reset(token)


def _length_of_run() -> int:
    steps = _RUN_LENGTH.get()
    if steps is None:
        raise ValueError(
            "WarmupDecay: `total_steps` is 'auto', but there is no Trainer that knows the length of the run. Give a number of "
            "optimizer steps."
        )
    length = steps()
    if not math.isfinite(length) or length < 1:
        raise ValueError(
            "WarmupDecay: `total_steps` is 'auto', but neither `max_steps` nor `max_epochs` of the Trainer limits the run. Set "
            "one of them, or give a number of optimizer steps."
        )
    return int(length)


class WarmupDecay(LRScheduler):
    """Linear warm-up to the optimizer's learning rate, then constant, then decay to a share of it."""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int | Literal["auto"] = "auto",
        warmup_steps: int = 0,
        decay: Literal["none", "linear", "cosine"] = "cosine",
        decay_from: float = 0.0,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        """Set up the schedule. Steps are optimizer steps.

        Args:
            optimizer: Its learning rates are the peaks.
            total_steps: The step at which the decay ends. The rate is constant after it. `auto` takes the length of the run:
                `max_steps` of the Trainer, or the steps of its `max_epochs`.
            warmup_steps: The number of steps of linear warm-up. With `total_steps: auto` at most half of the run.
            decay: The shape of the decay.
            decay_from: The share of `total_steps` after which the decay starts. 0 starts it at the end of the warm-up.
            final: The share of the peak that is left at the end.
            last_epoch: For resuming by hand, as in torch.

        Raises:
            ValueError: If the numbers do not describe a schedule, or if the length of the run is not known.
        """
        if total_steps == "auto":
            total_steps = _length_of_run()
            warmup_steps = min(warmup_steps, total_steps // 2)
        if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                f"WarmupDecay: `total_steps` must be at least 1 and `warmup_steps` from 0 to `total_steps`, but got "
                f"{total_steps} and {warmup_steps}."
            )
        if not 0 <= decay_from < 1 or not 0 <= final <= 1:
            raise ValueError(
                f"WarmupDecay: `decay_from` must be in [0, 1) and `final` in [0, 1], but got {decay_from} and {final}."
            )
        if decay not in ("none", "linear", "cosine"):
            raise ValueError(f"WarmupDecay: `decay` must be 'none', 'linear' or 'cosine', but got {decay!r}.")
        self.total_steps, self.warmup_steps, self.final, self.decay = total_steps, warmup_steps, final, decay
        self.decay_start = max(warmup_steps, int(decay_from * total_steps))
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """Return the share of the peak at an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "none" or step < self.decay_start:
            return 1.0
        done = min(1.0, (step - self.decay_start) / max(1, self.total_steps - self.decay_start))
        left = 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * left

    def get_lr(self) -> list[float | Tensor]:
        """Return the current learning rates of the parameter groups."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step of a state, with this schedule's own settings. Load the optimizer's state first.

        Args:
            state_dict: The state of a schedule of this class. Its settings may differ.
        """
        own = {name: getattr(self, name) for name in ("total_steps", "warmup_steps", "decay", "decay_start", "final")}
        super().load_state_dict({**state_dict, **own})
        if any(state_dict.get(name) != value for name, value in own.items()):
            # The loaded optimizer has the rate of the old settings, which is 0 after a finished decay.
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            self._last_lr = self.get_lr()
