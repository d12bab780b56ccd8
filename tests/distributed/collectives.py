"""A log of the collectives of one rank."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# FSDP2 calls the two of the first line since torch 2.13, and the next two before.
TENSORS = (
    *("all_gather_single", "reduce_scatter_single"),
    *("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "all_gather", "reduce", "gather"),
    *("scatter", "all_to_all", "all_to_all_single", "barrier"),
)
OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


class Collective(NamedTuple):
    """One call."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    group: str
    """``world`` for the group of the training, ``own`` for any other."""
    from_lightning: bool
    """Whether Lightning asks for it by itself, and not this package."""


@contextmanager
def logged() -> Iterator[list[Collective]]:
    """Log the collectives within a ``with`` block. What one collective calls in turn is not logged."""
    calls: list[Collective] = []
    depth = 0

    def wrapped(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if depth == 0:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            group = kwargs.get("group") or next((value for value in args if isinstance(value, dist.ProcessGroup)), None)
            shapes, dtypes = tuple(tuple(t.shape) for t in tensors), tuple(str(t.dtype) for t in tensors)
            own = "world" if group is None or group is dist.group.WORLD else "own"
            calls.append(Collective(name, shapes, dtypes, own, _from_lightning()))
        depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            depth -= 1

    with ExitStack() as stack:
        for name in (each for each in (*TENSORS, *OBJECTS) if hasattr(distributed_c10d, each)):
            replacement = functools.partial(wrapped, name, getattr(distributed_c10d, name))
            for module in (each for each in (dist, distributed_c10d) if hasattr(each, name)):
                stack.enter_context(mock.patch.object(module, name, replacement))
        yield calls


def _from_lightning() -> bool:
    """Whether the nearest code that is neither torch's nor a test's is Lightning's."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("lightning_align"):
            return False
        if name.startswith(("lightning.", "lightning_fabric", "torchmetrics")):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
