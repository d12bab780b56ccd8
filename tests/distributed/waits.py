"""Finds waits in the group of the training, whose timeout ends a run, that may be long."""

import traceback
from typing import Any

import torch.distributed as dist

ALLOWED = (
    "torch/distributed/checkpoint",
    "torch/distributed/fsdp",
    "torch/distributed/distributed_c10d",
    "in _sync_ddp",
    "in gather_all_tensors",
)
"""Ranks come to them after the same work: the writing of a shard each, or, as sums and metrics, after a barrier."""


class LongWait(AssertionError):
    """A wait in the group of the training, after work that may differ between ranks."""


def forbid_long_waits() -> None:
    """Refuse exchanges of objects in the group of the training, and barriers unless the ranks met in another group before."""
    met = False

    def guard(name: str) -> None:
        real = getattr(dist, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal met
            group = kwargs.get("group") or next((arg for arg in args if isinstance(arg, dist.ProcessGroup)), None)
            is_training = group in (None, dist.group.WORLD)
            stack = traceback.format_stack()[:-1]
            if is_training and not (name == "barrier" and met) and not any(part in "".join(stack[-8:]) for part in ALLOWED):
                raise LongWait(f"{name} in the group of the training:\n{''.join(stack[-8:])}")
            result = real(*args, **kwargs)
            met = not is_training and name == "barrier"
            return result

        setattr(dist, name, guarded)

    for name in ("barrier", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"):
        guard(name)
