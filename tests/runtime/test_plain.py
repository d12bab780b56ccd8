import io
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict
from enum import Enum, StrEnum
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lightning_align.runtime.plain import foreign, plain


class Mode(StrEnum):
    MIN = "min"


class Number(Enum):
    TWO = 2


class Name(str):
    pass


def opens(value: Any) -> bool:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except Exception:  # an UnpicklingError, or what a class raises when it is built
        return False
    return True


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (UserDict(a=UserList([1, 2])), {"a": [1, 2]}),
        (MappingProxyType({"a": (1, UserList())}), {"a": (1, [])}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        ([Mode.MIN, Number.TWO, Name("x")], ["min", 2, "x"]),
        ({"path": Path("a/b"), "pure": PurePosixPath("c")}, {"path": "a/b", "pure": "c"}),
        ([np.float64(0.5), np.int64(3), np.bool_(True), np.str_("s")], [0.5, 3, True, "s"]),
        (frozenset({1}), {1}),
        (range(3), [0, 1, 2]),
        ({"a": None, "b": b"x", "c": 1j}, {"a": None, "b": b"x", "c": 1j}),
    ],
    ids=str,
)
def test_values_of_other_kinds_become_what_torch_opens(value: Any, expected: Any) -> None:
    made = plain(value)
    assert made == expected and repr(made) == repr(expected), "equal, and of the same types"
    assert not list(foreign(made)) and opens(made)


def test_what_torch_opens_stays() -> None:
    tensor, ordered = torch.ones(2), OrderedDict(b=1, a=2)
    value = {"t": tensor, "o": ordered, "n": Counter("aab"), "s": torch.Size([2]), "d": torch.float32, "c": torch.device("cpu")}
    made = plain(value)
    assert made["t"] is tensor and list(made["o"]) == ["b", "a"] and type(made["o"]) is OrderedDict
    assert made == value and type(made["n"]) is Counter and type(made["s"]) is torch.Size
    assert not list(foreign(made)) and opens(made)


def test_what_cannot_be_held_is_found_with_its_path() -> None:
    value = plain({"a": [1, {"b": object()}], "f": print})
    assert [(found.path, found.kind) for found in foreign(value)] == [
        ("a/1/b", "object"),
        ("f", "builtin_function_or_method"),
    ]
    assert not opens(value)


@pytest.mark.parametrize(
    "value", [object(), len, np.ones(2), Mode, slice(1), Exception("x")], ids=lambda value: type(value).__name__
)
def test_foreign_is_at_least_as_strict_as_torch(value: Any) -> None:
    assert list(foreign(plain(value))) or opens(plain(value))


def test_omegaconf_containers_become_plain() -> None:
    config = OmegaConf.create({"betas": [0.9, 0.98], "inner": {"size": 3, "again": "${inner.size}"}})
    made = plain(config)
    assert made == {"betas": [0.9, 0.98], "inner": {"size": 3, "again": 3}} and type(made["betas"]) is list
