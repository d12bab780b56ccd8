"""The JSON files of a database, written with a hash of their content, and read with a check of it.

Such a file says which other files belong to a database. It can be damaged, edited, or come from someone else. So its shape is
checked where it is read, and a name in it never leads out of the folder of the database.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_align.runtime.checksums import SEAL, sealed, unsealed

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""The name of a file in the folder that names it."""
HEAD_KEYS = frozenset(
    {
        "base",
        "generation",
        "retriever",
        "made_with",
        "encoder",
        "deleted",
        "stages",
        "queries",
        "tokenizer",
        "compacted",
        "removed",
    }
)
"""The keys of ``database.json``."""
STAGE_NAME = re.compile(r"(chunks|vectors|index|lexical|neighbors)-[0-9a-f]{16}")
"""The name of the folder of a stage."""


def seal(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a JSON file with the hash of its content."""
    whole = sealed(content)
    try:
        return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return (json.dumps(whole, indent=2) + "\n").encode()


def read_sealed(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Read a file that `seal` made. The hash is left out.

    Args:
        path: The file.
        known: The keys of files of release 0.1.0, which have no hash. With another key, the name of the hash is damaged.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON, not an object, or not what was written. The message does not name the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    rest = unsealed(content)
    if SEAL not in content and not rest.keys() <= set(known):
        raise ValueError("it has no hash")
    return rest


def value_of(content: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """Return a value of an object.

    Raises:
        ValueError: If it is missing or of another type. The message does not name the file.
    """
    if name not in content:
        raise ValueError(f"it has no {name!r}")
    value, kinds = content[name], kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("None" if each is type(None) else each.__name__ for each in kinds)
        raise ValueError(f"its {name!r} must be of type {expected}, but is {value!r:.60}")
    return value


def check_head(head: Mapping[str, Any]) -> None:
    """Check the shape of ``database.json``.

    Raises:
        ValueError: If a value is missing, is of another type, or names a place outside of the folder.
    """
    stages, queries = value_of(head, "stages", dict), value_of(head, "queries", dict)
    sets = [(stages, ("chunks", "neighbors")), *((value_of(queries, name, dict), ("chunks", "neighbors")) for name in queries)]
    for folders, needed in sets:
        for kind in {*needed, *folders}:
            folder = value_of(folders, kind, str)
            if not STAGE_NAME.fullmatch(folder) or not folder.startswith(f"{kind}-"):
                raise ValueError(f"it names {folder!r:.60} as the folder of the stage {kind}")
    if unknown := stages.keys() - {"chunks", "vectors", "index", "lexical", "neighbors"}:
        raise ValueError(f"it names an unknown stage {min(unknown)!r:.60}")
    base = value_of(head, "base", str)
    if not STAGE_NAME.fullmatch(base):
        raise ValueError(f"it names {base!r:.60} as a folder")
    value_of(head, "encoder", (str, type(None)))
    for name, kind in (("generation", int), ("retriever", str)):
        value_of(head, name, kind)
    made_with = value_of(head, "made_with", dict)
    for name, kinds in (("tokenizer", (str, type(None))), ("encoder", (str, type(None))), ("k", (int,)), ("index", (dict,))):
        value_of(made_with, name, kinds)
    for name, kind in (("deleted", int), ("removed", str)):
        listed = value_of(head, name, list) if name in head or name == "deleted" else []
        if wrong := [value for value in listed if not isinstance(value, kind) or isinstance(value, bool)]:
            raise ValueError(f"its {name!r} must list values of type {kind.__name__}, but has {wrong[0]!r:.60}")
    own = value_of(head, "tokenizer", str) if "tokenizer" in head else ""
    place = PurePosixPath(own.partition("?")[0])
    if place.is_absolute() or ".." in place.parts or "\\" in str(place) or ":" in str(place):
        raise ValueError(f"it names {own!r:.60} as the tokenizer, which is outside of the folder")
