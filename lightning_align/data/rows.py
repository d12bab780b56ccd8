"""Where rows come from: a file, a dataset of the Hugging Face hub, or a synthetic task.

A row is a dictionary of fields with an origin, the file and line that a person can open. A line that cannot be read is
still a row, one with a problem: who reads decides what becomes of it, and nothing disappears on the way.
"""

import csv
import difflib
import gzip
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
SUFFIXES = (*JSON_LINES, ".parquet", ".csv")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a character that JSON writes in two escapes. JSON may hold one alone, as of a text that was cut; UTF-8 may not."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


class RowTask(ABC):
    """A source that makes its rows instead of reading them.

    Subclass it for synthetic tasks, and give it wherever a path to a file may stand. Constructor arguments should be
    primitives, so that a config file can write them. A task that can tell a right response from a wrong one also has a
    method ``grade(prompt, response) -> bool`` (see `Grader`).
    """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Everything that the rows depend on, as a string: the tokenised rows are cached under it."""

    @abstractmethod
    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows, the same ones in the same order at every call."""


@runtime_checkable
class Grader(Protocol):
    """What can tell whether a response is right."""

    def grade(self, prompt: str, response: str) -> bool:
        """Says whether ``response`` answers ``prompt``."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source."""

    fields: dict[str, Any]
    origin: str
    """Where a person finds the row: ``"data.jsonl:17"``, ``"data.parquet, row 17"``."""
    problem: str = ""
    """Why the row could not be read; empty when it could."""


def read_rows(source: str | RowTask, *, split: str = "train") -> Iterator[Row]:
    """Yields the rows of a source in order.

    Args:
        source: A file (``.jsonl``, ``.jsonl.gz``, ``.parquet``, ``.csv``), a dataset of the hub as ``name``,
            ``name:split`` or ``name:config:split``, or a task. Blank lines of a JSON-lines file are no rows.
        split: The split of a hub dataset whose name gives none.

    Raises:
        ValueError: If the source is missing, a folder, empty, unreadable or of an unknown kind.
    """
    if isinstance(source, RowTask):
        return _task_rows(source)
    suffix = _suffix(source)
    if suffix is None:
        return _hub_rows(source, split=split)
    if suffix in JSON_LINES:
        return _json_rows(source)
    return _csv_rows(source) if suffix == ".csv" else _parquet_rows(source)


def source_fingerprint(source: str | RowTask, *, split: str = "train") -> str:
    """A hash of the content of a source: equal contents at two paths have one fingerprint.

    Raises:
        ValueError: If the source is missing, a folder, empty, unreadable or of an unknown kind.
    """
    if isinstance(source, RowTask):
        return f"{type(source).__module__}.{type(source).__qualname__}:{source.fingerprint}"
    if _suffix(source) is None:
        # The library's own fingerprint covers the revision and the files of a dataset; nothing cheaper does.
        return f"hub:{_load_hub(source, split=split)._fingerprint}"
    with _open_binary(source) as file:
        return f"{_suffix(source)}:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _task_rows(task: RowTask) -> Iterator[Row]:
    name = type(task).__name__
    for number, fields in enumerate(task.rows(), start=1):
        yield Row(fields, f"{name}, row {number}")


def _json_rows(path: str) -> Iterator[Row]:
    num_rows = 0
    line_number = 0
    with _open_binary(path) as raw:
        lines: IO[bytes] = gzip.open(raw) if path.endswith(".gz") else raw  # type: ignore[assignment]
        try:
            # Bytes, not text: a text file would also break lines at U+2028 and would fail for a whole block of them
            # where only one is not UTF-8.
            for line_number, line in enumerate(lines, start=1):
                if line_number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                num_rows += 1
                yield _parse_line(line, origin=f"{path}:{line_number}")
        except (OSError, EOFError) as error:
            raise ValueError(
                f"{path}, after line {line_number}: cannot be read ({error}); is the file complete? Fetch or write it again."
            ) from error
    if num_rows == 0:
        raise ValueError(f"{path} has no rows: expected one JSON object a line")


def _parse_line(line: bytes, *, origin: str) -> Row:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row({}, origin, f"is not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}")
    except (json.JSONDecodeError, RecursionError) as error:
        return Row({}, origin, f"is not JSON: {error}")
    except ValueError as error:  # a number of thousands of digits
        return Row({}, origin, f"cannot be read: {error}")
    if not isinstance(fields, dict):
        return Row({}, origin, f"is a JSON {type(fields).__name__}, expected an object with named fields")
    if _SURROGATE.search(line):
        for name, value in fields.items():
            try:
                json.dumps({name: value}, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start : error.start + 1]
                return Row({}, origin, f"has half a character, {half!r}, in field {name!r}: expected both halves, or neither")
    return Row(fields, origin)


def _csv_rows(path: str) -> Iterator[Row]:
    num_rows = 0
    # The module's own limit, which is for the whole process, is 128 KiB a field.
    csv.field_size_limit(2**31 - 1)
    with _open_binary(path) as raw:
        # Not through a table library: those turn the response "12" into a number and "NA" into nothing, and name no
        # line.
        reader = csv.DictReader(TextIOWrapper(raw, encoding="utf-8-sig", newline=""), strict=True)
        try:
            for fields in reader:
                num_rows += 1
                problem = ""
                if None in fields or None in fields.values():
                    problem = f"has not as many fields as the header ({', '.join(reader.fieldnames or ())})"
                yield Row({} if problem else dict(fields), f"{path}:{reader.line_num}", problem)
        except (csv.Error, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: cannot be read as CSV ({error})") from error
    if num_rows == 0:
        raise ValueError(f"{path} has no rows: expected a header line and one line or more")


def _parquet_rows(path: str) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    with _open_binary(path) as raw:
        try:
            for batch in pq.ParquetFile(raw).iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path}, row {number}")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}, after row {number}: cannot be read as Parquet ({error})") from error
    if number == 0:
        raise ValueError(f"{path} has no rows")


def _hub_rows(name: str, *, split: str) -> Iterator[Row]:
    number = 0
    for number, fields in enumerate(_load_hub(name, split=split), start=1):
        yield Row(dict(fields), f"{name}, row {number}")
    if number == 0:
        raise ValueError(f"dataset {name} has no rows")


def _load_hub(name: str, *, split: str) -> Any:
    from datasets import load_dataset

    dataset, *rest = name.split(":")
    config = rest[0] if len(rest) == 2 else None
    try:
        return load_dataset(dataset, config, split=rest[-1] if rest else split)
    except Exception as error:
        # As above: network, hub and builder errors are of many classes and mean one thing to the user.
        raise ValueError(
            f"{name!r} is neither a file here (looked in {Path.cwd()}{_near(name)}) nor a dataset that could be loaded "
            f"from the hub ({type(error).__name__}: {error}). Files end in {', '.join(SUFFIXES)}; hub datasets are written "
            "name, name:split or name:config:split"
        ) from error


def _suffix(path: str) -> str | None:
    """The known suffix of a file that exists, or None for a name of the hub."""
    suffix = next((suffix for suffix in SUFFIXES if path.endswith(suffix)), None)
    file = Path(path)
    try:
        if file.is_dir():
            inside = sorted(str(f) for f in file.iterdir() if f.name.endswith(SUFFIXES))
            hint = f"; did you mean {', '.join(inside[:5])}?" if inside else f"; files end in {', '.join(SUFFIXES)}"
            raise ValueError(f"{path} is a folder, expected a file{hint}")
        exists = file.is_file()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if suffix is not None and not exists:
        raise ValueError(f"there is no file {path} (looked in {Path.cwd()}{_near(path)})")
    if suffix is None and exists:
        raise ValueError(f"{path} is of an unknown kind: expected a name that ends in {', '.join(SUFFIXES)}")
    if suffix is None and not _HUB_NAME.fullmatch(path):
        raise ValueError(f"there is no file {path} (looked in {Path.cwd()}{_near(path)}), and it is no name of the hub either")
    return suffix


def _near(path: str) -> str:
    """A hint at what stands near a path that does not exist."""
    parent = Path(path).parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    if parent != Path(path).parent:
        return f"; the folder {Path(path).parent} does not exist"
    names = sorted(f.name for f in parent.iterdir() if f.name.endswith(SUFFIXES))
    near = difflib.get_close_matches(Path(path).name, names, n=3) or names[:3]
    return f"; near it: {', '.join(str(parent / name) for name in near)}" if near else ""


def _open_binary(path: str) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
