"""Drawn tokens on their way to the host.

On a GPU the host starts the steps of a look and then the copy of their tokens, and reads the copy of the look before. The GPU
so always has work while the host looks for ended rows.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
Look = tuple[list[R], list[list[int]], list[list[float]]]


class Looks(Generic[R]):
    """Copies of tokens and log-probs, in the order in which they were made.

    Args:
        device: The device of the tokens.
        late: Whether copies may be read later. If not, each is complete at once.
    """

    def __init__(self, device: torch.device, *, late: bool) -> None:
        self._late = late and has_events(device)
        self._waiting: deque[tuple[list[R], Callable[[], tuple[list[list[int]], list[list[float]]]]]] = deque()

    def add(self, rows: list[R], tokens: Tensor, logprobs: Tensor) -> None:
        """Start the copy of a look.

        Args:
            rows: The B rows.
            tokens: (B, N) int64 tokens.
            logprobs: (B, N) float32 log-probs in nats.
        """
        self._waiting.append((rows, _start_copy(tokens, logprobs) if self._late else _copied(tokens, logprobs)))

    def read(self, late: int) -> Iterator[Look[R]]:
        """Yield the rows, tokens and log-probs of each look.

        Args:
            late: The number of looks that are left for later, if copies may be read later.
        """
        while len(self._waiting) > (late if self._late else 0):
            rows, read = self._waiting.popleft()
            yield rows, *read()


def has_events(device: torch.device) -> bool:
    """Return whether the host can wait for one copy from a device. A simulated CUDA device without a GPU has no events."""
    return device.type == "cuda" and torch.cuda.is_available()


def _copied(tokens: Tensor, logprobs: Tensor) -> Callable[[], tuple[list[list[int]], list[list[float]]]]:
    """Copy to the host. A device is waited for once: float64 holds both exactly."""
    if tokens.device.type in ("cpu", "mps"):  # MPS has no float64
        return lambda: (tokens.tolist(), logprobs.tolist())
    both = torch.stack((tokens.double(), logprobs.double())).cpu()
    return lambda: _apart(both)


def _start_copy(tokens: Tensor, logprobs: Tensor) -> Callable[[], tuple[list[list[int]], list[list[float]]]]:
    """Start a copy to pinned memory, and return what waits for it and reads it."""
    both = torch.stack((tokens.double(), logprobs.double()))
    host = torch.empty(both.shape, dtype=both.dtype, pin_memory=torch.cuda.is_available())
    host.copy_(both, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> tuple[list[list[int]], list[list[float]]]:
        event.synchronize()
        return _apart(host)

    return read


def _apart(both: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    return both[0].long().tolist(), both[1].tolist()
