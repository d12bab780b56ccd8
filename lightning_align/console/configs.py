"""The configurations that the package ships, by name, and ``lightning-align configs``. Imports nothing large."""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from lightning_align.runtime.shipped import CONFIGS

SUFFIX = ".yaml"
USAGE = """\
usage: lightning-align configs
       lightning-align configs show NAME
       lightning-align configs copy NAME [FILE]

List the configurations that the package ships, print one, or copy one to edit it.

Pass a name to any command: `lightning-align fit --config dpo/jsonl`. `copy` writes to FILE, by default to the current folder
as dpo_jsonl.yaml, and never replaces a file.
"""


def shipped() -> dict[str, Path]:
    """Return the shipped configurations by name, such as ``dpo/jsonl``."""
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob(f"*{SUFFIX}"))}


def find(name: str) -> Path | None:
    """Return the shipped configuration of a name, or None.

    Args:
        name: The name: ``dpo/jsonl``. ``dpo/jsonl.yaml`` and ``configs/dpo/jsonl.yaml`` are the same.
    """
    return shipped().get(name.removeprefix("./").removeprefix("configs/").removesuffix(SUFFIX))


def nearest(name: str) -> list[str]:
    """Return the names of shipped configurations that are most like a name that does not exist."""
    asked = name.removeprefix("./").removeprefix("configs/").removesuffix(SUFFIX)
    return get_close_matches(asked, shipped(), n=3, cutoff=0.6)


def resolve(arguments: Sequence[str]) -> list[str]:
    """Replace the names of shipped configurations after ``--config`` by their paths. A file of that name has precedence."""
    found, follows = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if follows:
            found.append(_path(argument))
        elif equals and flag in ("--config", "-c"):
            found.append(f"{flag}={_path(value)}")
        else:
            found.append(argument)
        follows = not follows and argument in ("--config", "-c")
    return found


def _path(value: str) -> str:
    if Path(value).is_file():
        try:
            Path(value).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--config {value} must be YAML in UTF-8, but byte {error.start} is not text.") from error
        return value
    path = find(value)
    return value if path is None else str(path)


def summary(path: Path) -> str:
    """Return the first sentence of the comment that a configuration begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    return re.split(r"(?<=\.) (?=[A-Z`])|:$", " ".join(lines), maxsplit=1)[0]


def listing() -> str:
    """Return a line per configuration: its name and what it does."""
    configs = shipped()
    width = max(map(len, configs))
    lines, group = [], ""
    for name, path in configs.items():
        if name.partition("/")[0] != group:
            group = name.partition("/")[0]
            lines.append("")
        lines.append(f"{name:<{width}}  {summary(path)}")
    return "\n".join(
        [*lines[1:], "", "Use one: lightning-align fit --config NAME. Edit one: lightning-align configs copy NAME."]
    )


def copy(name: str, file: str | None = None) -> Path:
    """Copy a shipped configuration to a file.

    Args:
        name: The name of the configuration.
        file: The file to write. Default is the name with ``_`` for ``/``, in the current folder.

    Returns:
        The path of the file.

    Raises:
        ValueError: If there is no such configuration, or if the file exists.
    """
    source = _get(name)
    target = Path(file or name.removeprefix("configs/").removesuffix(SUFFIX).replace("/", "_") + SUFFIX)
    if target.is_dir():
        target /= source.name
    if target.exists():
        raise ValueError(f"{target} exists. Remove it, or name another file: lightning-align configs copy {name} FILE")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return target


def _get(name: str) -> Path:
    path = find(name)
    if path is None:
        near = " or ".join(repr(other) for other in nearest(name))
        hint = f"did you mean {near}?" if near else "`lightning-align configs` lists all."
        raise ValueError(f"no configuration {name!r}; {hint}")
    return path


def main(arguments: Sequence[str]) -> int:
    """Run ``lightning-align configs`` and return the exit status."""
    match list(arguments):
        case [] | ["list"]:
            print(listing())
        case ["show", name]:
            try:
                print(_get(name).read_text(encoding="utf-8"), end="")
            except ValueError as error:
                return _fail(error)
        case ["copy", name, *rest] if len(rest) <= 1:
            try:
                print(f"wrote {copy(name, *rest)}")
            except (ValueError, OSError) as error:
                return _fail(error)
        case ["-h" | "--help"]:
            print(USAGE, end="")
        case _:
            print(USAGE, file=sys.stderr, end="")
            return 2
    return 0


def _fail(error: Exception) -> int:
    print(f"lightning-align: error: {error}", file=sys.stderr)
    return 1
