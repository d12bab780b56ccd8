"""What a checkpoint may hold: tensors, primitive types, and the containers that torch opens with ``weights_only=True``."""

import os
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

PRIMITIVES: Final = (type(None), bool, int, float, complex, str, bytes, bytearray)
"""Types without content of other types. Their subclasses become them."""

OPENED: Final = (*PRIMITIVES, Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device)
"""Types that `torch.load` opens with ``weights_only=True``, by identity."""

CONTAINERS: Final = (OrderedDict, Counter)
"""Kinds of dictionaries that are opened as they are."""


class PlainNumbers:
    """Keeps Python's numbers where it is given scalars of numpy, which a search of hyperparameters draws."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.item() if isinstance(value, np.generic) else value)


class Foreign(NamedTuple):
    """A value that a checkpoint cannot hold."""

    path: str
    """The keys that lead to it, such as ``callbacks/EarlyStopping/folder``."""
    kind: str
    """The name of its type."""


def plain(value: Any) -> Any:
    """Return a value with containers of other libraries replaced by dictionaries and lists.

    Configuration libraries hand over containers of their own, such as ``DictConfig`` and ``ListConfig`` of OmegaConf. They work
    as arguments, but a checkpoint that holds one cannot be opened with ``weights_only=True``. Paths become strings, members of
    enumerations their values, and scalars of numpy Python's numbers.

    Args:
        value: Anything. Tensors, and values that are no container, are returned as they are.
    """
    if type(value) in OPENED or isinstance(value, Tensor):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, np.generic):
        return value.item()
    bases: tuple[Any, ...] = (str, int, float, complex, bytes)
    for primitive in bases:
        if isinstance(value, primitive):
            return primitive(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        if type(value) in CONTAINERS:
            kept: Any = value.copy()  # type: ignore[attr-defined]  # a Mapping has no copy, these have
            for key in value:
                kept[key] = plain(value[key])
            return kept
        return {plain(key): plain(value[key]) for key in value}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, Set):
        return {plain(item) for item in value}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return value


def foreign(value: Any, path: str = "") -> Iterator[Foreign]:
    """Yield what is in a value that torch does not open with ``weights_only=True``.

    Args:
        value: A value that `plain` returned.
        path: The keys that lead to it.
    """
    if type(value) in (dict, *CONTAINERS):
        for key, item in value.items():
            yield from foreign(item, f"{path}/{key}" if path else str(key))
    elif type(value) in (list, tuple, set):
        for number, item in enumerate(value):
            yield from foreign(item, f"{path}/{number}" if path else str(number))
    elif not isinstance(value, Tensor) and type(value) not in (*OPENED, *torch.serialization.get_safe_globals()):
        yield Foreign(path, type(value).__qualname__)
