"""Reading the files of a generated set. Damage is reported with what is wrong and where."""

import json
import math
from pathlib import Path
from typing import Any

from lightning_align.runtime.checksums import SEAL, unsealed

Row = dict[str, Any]


def read_identity(folder: Path) -> Row:
    """Return the settings that an existing set was generated with. Empty if there is none.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = folder / "identity.json"
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> Row:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {path} ({error}). Remove its folder to generate the set again.") from error


def checked_row(row: Any) -> Row:
    """Return a row of a set, or raise a ValueError that says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("it is not an object")
    kinds: dict[str, type] = {"row": int, "prompt": str, "real": str, "real_logprob": float, "generated": list}
    _check(row, kinds)
    if unknown := row.keys() - {*kinds, SEAL}:
        raise ValueError(f"it has the unknown entry `{short(unknown.pop())}`")  # perhaps a damaged name of the checksum
    for answer in row["generated"]:
        if not isinstance(answer, dict):
            raise ValueError("a response is not an object")
        _check(answer, {"iteration": int, "text": str, "tokens": list, "reason": str, "logprob": float})
        if not all(type(token) is int and token >= 0 for token in answer["tokens"]):
            raise ValueError("`tokens` must be a list of token ids")
    return unsealed(row)


def _check(values: Row, kinds: dict[str, type]) -> None:
    for name, kind in kinds.items():
        value: Any = values.get(name)
        right = type(value) is kind
        if kind is float:
            right = type(value) in (int, float) and math.isfinite(value)
        if not right:
            expected = "finite number" if kind is float else kind.__name__
            raise ValueError(f"`{name}` must be a {expected}, but is {short(value)}")


def short(value: Any) -> str:
    """Return a value as a text for a message, cut if it is long."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:24]}…"
