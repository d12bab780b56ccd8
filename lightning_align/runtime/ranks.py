"""What ranks ask of each other: which part of the work is theirs, and whether all agree."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(items: list[T]) -> list[T]:
    """This rank's part of a list: every n-th item, so that the parts interleave back into the list."""
    rank, ranks = world()
    return items[rank::ranks]


def everyone(flag: bool, device: torch.device) -> bool:
    """Whether the flag is true on every rank; a collective."""
    if world()[1] == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value)


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers; a collective."""
    if world()[1] == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are spread over ranks, so that every forward pass is a collective."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
