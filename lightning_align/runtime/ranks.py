"""Ranks of a distributed run: who has which part of the work, and small agreements between them."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Return (rank, number of ranks), or (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


_copies = 1


def set_copies(size: int) -> None:
    """Say how many neighboring ranks have the same rows, because they hold the parts of one model (tensor parallelism)."""
    global _copies
    _copies = size


def data_world() -> tuple[int, int]:
    """Return (number, count) of this rank's share of the rows. Ranks that hold parts of one model have the same share."""
    rank, ranks = world()
    copies = _copies if ranks > 1 else 1
    return rank // copies, ranks // copies


def is_first_copy() -> bool:
    """Return whether no rank before this one has the same rows."""
    rank, ranks = world()
    return ranks == 1 or rank % _copies == 0


def share(items: list[T]) -> list[T]:
    """Return this rank's part of a list: every n-th item, where n is the number of ranks."""
    rank, ranks = data_world()
    return items[rank::ranks]


def everyone(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is true on every rank. This is a collective."""
    if world()[1] == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value)


def largest(number: int, device: torch.device) -> int:
    """Return the largest of the ranks' numbers. This is a collective."""
    if world()[1] == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model's parameters are sharded over ranks, so that every forward pass is a collective."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(weight: Tensor) -> Tensor:
    """Return a replicated weight as a plain tensor, and any other tensor as it is. Its gradient must be that of all ranks."""
    if isinstance(weight, DTensor) and all(isinstance(placement, Replicate) for placement in weight.placements):
        return weight.to_local()
    return weight
