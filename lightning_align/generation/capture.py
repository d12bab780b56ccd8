"""CUDA graphs of steps that have no arguments. On other devices the steps run as they are."""

from collections.abc import Callable, Hashable

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_align.generation.casting import num_cleared

GRAPHS = ("cuda",)
"""The types of devices whose steps are captured."""
WARMUPS = 2
"""How often a step runs before it is captured, so that libraries allocate their memory outside of the graph."""


class Captures:
    """Steps by their key, each captured when it first runs. All graphs share one pool of memory.

    A step must compute the same if it runs again, because it runs a few times before it is captured.

    Args:
        device: The device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        # A device that is only pretended has no graphs.
        self._captures = device.type in GRAPHS and torch.cuda.is_available()
        self._steps: dict[Hashable, Callable[[], Tensor]] = {}
        self._replays: dict[Hashable, tuple[Callable[[], Tensor], int | None]] = {}
        self._pool: object = None

    def run(self, key: Hashable, make: Callable[[], Callable[[], Tensor]]) -> Tensor:
        """Run the step of a key, and return its result, which its next run overwrites.

        Args:
            key: The key.
            make: A function that makes the step of this key.
        """
        if key not in self._steps:
            self._steps[key] = make()
        if not self._captures:
            return self._steps[key]()
        # A graph reads the casts that autocast keeps. Once they are cleared, their memory may have other contents.
        casts = num_cleared() if torch.is_autocast_enabled("cuda") else None
        replay, own = self._replays.get(key, (None, None))
        if replay is None or own != casts:
            replay = self._captured(self._steps[key])
            self._replays[key] = replay, casts
        return replay()

    def _captured(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        try:
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
                out = step()
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:120]
            rank_zero_info(f"Decoding steps are not captured as a CUDA graph, which is slower ({reason}).")
            self._captures = False
            return step

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
