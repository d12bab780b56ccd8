"""Ranks that share work of unequal length, or that all must end if one of them fails."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_align.runtime.rank_link import failing
from lightning_align.runtime.ranks import world

T = TypeVar("T")
LONGEST = timedelta(days=30)
"""How long a rank waits for the others. The group of the training ends a run after 30 minutes."""


def of_first_rank(value: T) -> T:
    """Return the value of rank 0 on every rank. It goes through the CPU, whatever the backend of the training is."""
    team = Team()
    try:
        return team.share(value)
    finally:
        team.close()


class Team:
    """The ranks that share the work. Create it on all ranks together. Outside of a process group it has one rank.

    It has a process group of its own, of gloo on the CPU and with a long timeout: work such as generation, scoring or a stage
    of an index can keep one rank busy for hours, and objects are not copied to GPUs.
    """

    def __init__(self) -> None:
        self.rank, self.size = world()
        self._group = None if self.size == 1 else dist.new_group(backend="gloo", timeout=LONGEST)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Synchronize all ranks at the end of the ``with`` block. If a rank fails, all ranks raise.

        Raises:
            ValueError: On the ranks that did not fail, if another rank failed.
        """
        try:
            yield
        except BaseException as error:
            if self.size > 1 and isinstance(error, Exception):
                # The others may be in a collective of another group. If they are lost there, the error of this rank counts.
                with suppress(RuntimeError), failing(error):
                    self.gather(f"{type(error).__name__}: {error}")
            raise
        if self.size > 1:
            for rank, problem in enumerate(self.gather("")):
                if problem:
                    raise ValueError(f"Rank {rank} failed: {problem}. This rank stops too.")

    def share(self, value: T) -> T:
        """Return the value of rank 0 on every rank."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self._group)

    def close(self) -> None:
        """Destroy the process group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
