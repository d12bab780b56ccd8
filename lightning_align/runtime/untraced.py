"""Functions that `torch.compile` leaves as they are."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function, and all that it calls, out of the graphs of `torch.compile`, with its type.

    For what depends on values, such as the lengths of rows: a graph would fail, or be compiled again for each of them.

    Args:
        function: Any function.
    """
    disabled: Callable[P, R] = torch.compiler.disable(function)
    return disabled
