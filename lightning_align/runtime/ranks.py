"""Ranks of a distributed run: who has which part of the work, and small agreements between them."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Return (rank, number of ranks), or (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(items: list[T]) -> list[T]:
    """Return this rank's part of a list: every n-th item, where n is the number of ranks."""
    rank, ranks = world()
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
