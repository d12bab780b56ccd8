"""A filter of logits that the user wrote, given as a function or by its import path."""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor


class FilterSettings(Protocol):
    """The settings of this filter. `GenerationConfig` has them."""

    filter_fn: Any
    filter_kwargs: dict[str, Any]


def import_path(function: Any) -> str:
    """Return the import path of a function, or check a given path.

    A configuration holds the path and not the function, because checkpoints and generated sets store it.

    Args:
        function: A function, or the import path of one, such as ``my_package.filters.keep_digits``.

    Raises:
        ValueError: If there is no such function, or it cannot be imported by its module and name.
    """
    if isinstance(function, str):
        find(function)
        return function
    path = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', None)}"
    try:
        found: Any = find(path) if callable(function) else None
    except ValueError:
        found = None
    if found is not function or function is None:
        raise ValueError(
            f"`filter_fn` of GenerationConfig must be a function that can be imported by its module and name, or its import "
            f"path, but got {function!r}. Define it with `def` in a module, and give its settings in `filter_kwargs`."
        )
    return path


@cache
def find(path: str) -> Callable[..., Tensor]:
    """Import a function.

    Raises:
        ValueError: If there is none at this path.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(sys.modules[module] if module in sys.modules else import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`filter_fn` of GenerationConfig must be the import path of a function, but got {path!r} ({error}). Write it as "
            "module.function, and start the run where Python finds the module."
        ) from error
    if not callable(found):
        raise ValueError(f"`filter_fn` of GenerationConfig must be the import path of a function, but {path!r} is {found!r}.")
    function: Callable[..., Tensor] = found
    return function


def filtered_by_function(logits: Tensor, settings: FilterSettings) -> Tensor:
    """Apply the filter of the user, if there is one.

    Args:
        logits: The logits, (B, V). They are not changed.
        settings: The settings.

    Returns:
        The filtered logits, (B, V).

    Raises:
        ValueError: If the filter returns something else than logits.
    """
    if settings.filter_fn is None:
        return logits
    result = find(settings.filter_fn)(logits.clone(), **settings.filter_kwargs)
    if not isinstance(result, Tensor) or result.shape != logits.shape or not result.is_floating_point():
        got = f"shape {tuple(result.shape)}, {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"`filter_fn` {settings.filter_fn} must return logits of shape {tuple(logits.shape)}, but got {got}.")
    return result
