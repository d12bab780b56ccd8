"""Waits of a strategy that last as long as the work of one rank: saving, exporting, hashing, preparing data."""

from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch.strategies import Strategy

from lightning_align.runtime.team import Team

T = TypeVar("T")


class Patience:
    """Lets the barriers and broadcasts of a strategy wait in a `Team`.

    In the group of the training, a rank that waits longer than the group's timeout ends the run, and on GPUs a broadcast of an
    object goes through their memory. Lightning places a barrier after each checkpoint, for instance, which rank 0 alone writes.
    """

    def __init__(self) -> None:
        """Start without a strategy."""
        self._strategy: Any = None
        self._team: Team | None = None

    def begin(self, strategy: Strategy) -> None:
        """Replace the methods of a strategy until `end`. Every rank must call this."""
        self.end()
        untyped: Any = strategy
        barrier, broadcast = untyped.barrier, untyped.broadcast

        def patient_barrier(name: str | None = None) -> None:
            if dist.is_initialized():
                self._joint().wait()
            barrier(name)

        def patient_broadcast(value: T, src: int = 0) -> T:
            if not dist.is_initialized() or src != 0:
                told: T = broadcast(value, src)
                return told
            return self._joint().share(value)

        untyped.barrier, untyped.broadcast = patient_barrier, patient_broadcast
        self._strategy = untyped

    def end(self) -> None:
        """Restore the strategy."""
        if self._strategy is not None:
            del self._strategy.barrier, self._strategy.broadcast
            self._strategy = None
        if self._team is not None:
            self._team.close()
            self._team = None

    def _joint(self) -> Team:
        self._team = self._team or Team()
        return self._team
