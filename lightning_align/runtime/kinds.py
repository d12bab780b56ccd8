"""Arguments of a wrong type, refused where they are given.

The command line compares arguments with their annotations. In code, an argument of a wrong type fails later, in a line that
does not name it.
"""

import collections.abc
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

T = TypeVar("T")

_WORDS: Final[Mapping[Any, str]] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "None",
}
_SERIES: Final = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


def check_kinds(owner: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Compare arguments with their annotations.

    Scalars of numpy are numbers. Paths are strings, any sequence is a list, and a dictionary stands for a dataclass, and with
    ``class_path`` for an object, as on the command line. Annotations of other kinds are not compared.

    Args:
        owner: What has the arguments, for the message.
        hints: The annotation of each argument.
        values: The arguments. Those without an annotation are not compared.

    Raises:
        ValueError: If an argument is of a wrong type.
    """
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(
                f"`{name}` of {owner} must be {_described(hints[name])}, but got {value!r:.60} ({type(value).__name__})."
                f"{_remedy(value, hints[name])}"
            )


def hints_of(kind: Any) -> Mapping[str, Any]:
    """Return the annotations of all arguments of a class of this package, also of those that it hands on to its base classes.

    Arguments that a class of another package takes itself are left out: they may be of other types there.
    """
    return _hints(kind)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    package, found = __name__.partition(".")[0], dict[str, Any]()
    for base in reversed(kind.__mro__):
        init = vars(base).get("__init__")
        if not isinstance(init, types.FunctionType):
            continue
        names = inspect.signature(init).parameters
        if base.__module__.partition(".")[0] != package:
            found = {name: hint for name, hint in found.items() if name not in names}
        elif any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values()):
            found |= get_type_hints(init)
        else:  # it hands on what it makes of its own arguments
            found = get_type_hints(init)
    found.pop("return", None)
    return found


def from_fields(kind: Callable[..., T], values: Any, name: str) -> T | None:
    """Make a dataclass from a dictionary of its fields. Anything else is returned as it is.

    Args:
        kind: The dataclass.
        values: Its fields.
        name: The argument that the dictionary was given as.

    Raises:
        ValueError: If it has no such field.
    """
    if not isinstance(values, Mapping):
        given: T = values
        return given
    known = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]  # a dataclass is a function here
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Its fields are {', '.join(known)}."
            raise ValueError(f"`{name}` must have fields of {kind.__name__}, but got {key!r}. {hint}")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:  # which of them it must be is said by who takes it
        return any(isinstance(value, type(each)) for each in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    if isinstance(value, Mapping) and "class_path" in value:
        return True
    if hint is Callable or origin is collections.abc.Callable:
        return callable(value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, Mapping) and (len(inner) != 2 or all(_fits(each, inner[1]) for each in value.values()))
    if origin in _SERIES:
        if not isinstance(value, collections.abc.Iterable) or getattr(value, "ndim", 1) == 0:
            return False
        # An iterator could be read once only.
        compared = isinstance(value, collections.abc.Collection) and len(inner) == 1
        return not compared or all(_fits(each, inner[0]) for each in value)
    if isinstance(hint, type) and is_dataclass(hint):
        return isinstance(value, hint | Mapping)
    return True


def _alternatives(hint: Any) -> Iterator[Any]:
    """Yield the members of a union, also of a union within it."""
    for each in get_args(hint):
        yield from _alternatives(each) if get_origin(each) in (Union, types.UnionType) else (each,)


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        *first, last = dict.fromkeys(_described(each) for each in _alternatives(hint))
        return f"{', '.join(first)} or {last}"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (dict, collections.abc.Mapping):
        return "a dictionary" + (f" with values that are each {_described(inner[1])}" if len(inner) == 2 else "")
    if origin is collections.abc.Callable or hint is Callable:
        return "a function, class or module"
    if origin in _SERIES:
        return "a list" + (f" whose items are each {_described(inner[0])}" if inner else "")
    if isinstance(hint, type) and is_dataclass(hint):
        return f"a {hint.__name__}, a dictionary of its fields"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _remedy(value: Any, hint: Any) -> str:
    if hasattr(value, "save_pretrained"):
        return " Save it with `save_pretrained`, and give the folder."
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return " Give its `.item()`."
    if isinstance(value, str):
        for kind in (int, float):
            try:
                if _fits(kind(value), hint):
                    return " Leave out the quotes."
            except ValueError:
                continue
    return ""
