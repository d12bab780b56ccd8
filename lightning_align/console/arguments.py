"""Arguments of the command line, before and after they are parsed."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any


def overlay(saved: Any, given: Any) -> Any:
    """Merge given arguments into saved ones. Saved arguments of another class are dropped."""
    if not (isinstance(saved, Mapping) and isinstance(given, Mapping)):
        return given
    if "class_path" in given and str(given["class_path"]).rpartition(".")[2] != str(saved.get("class_path")).rpartition(".")[2]:
        return given
    return {**saved, **{name: overlay(saved.get(name), value) for name, value in given.items()}}


def refuse_empty_files(arguments: Sequence[str]) -> None:
    """Raise for an empty data file. The parser would read it as "null", as if no file was given."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    for flag, value in pairwise(words):
        if flag.startswith("--data.") and Path(value).is_file() and not Path(value).stat().st_size:
            raise ValueError(f"{flag} must be a file with rows, but {value} is empty.")


def root_of(error: ValueError) -> str:
    """Return what the constructor says. The parser wraps it in the errors of other types and the whole configuration."""
    found: BaseException = error
    while str(found).startswith("Does not validate against any of the Union subtypes") and found.__cause__ is not None:
        found = found.__cause__
    return re.sub(r"^Problem with given class_path '[^']*':\n\s*", "", str(found))
