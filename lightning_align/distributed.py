"""What ranks need of each other: a share of the work, an agreement to stop, a file published once."""

import os
from collections.abc import Callable
from pathlib import Path
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


def publish(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, then rename it: a reader finds all of it or nothing.

    Args:
        path: the file; its folder is made.
        write: writes to the path that it is given.

    Raises:
        ValueError: if the folder or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}): choose another path or free it") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def publish_text(path: str | Path, text: str) -> None:
    """`publish` for a text, in UTF-8."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    publish(path, write)


def check_writable(path: str | Path) -> None:
    """Find out whether `publish` will find a place for a file, without touching one that is there.

    Raises:
        ValueError: if the folder cannot be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}): choose another path or free it") from error
