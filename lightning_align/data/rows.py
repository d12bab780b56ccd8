"""Reading of rows from a file, a dataset of the Hugging Face hub, or a synthetic task.

A row is a dictionary of fields with an origin, such as its file and line. A line that cannot be read is still returned, as
a row with a problem, so that the caller decides what to do with it and no line is lost.
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
"""A surrogate: one of the two escapes that JSON uses for some characters. JSON allows one alone, UTF-8 does not."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


class RowTask(ABC):
    """A source that generates its rows instead of reading them.

    Subclass it for a synthetic task. A task can be used wherever the path of a file of rows is accepted. Constructor
    arguments should be primitives, so that a config file can hold them. A task that can check responses also has a method
    ``grade(prompt, response) -> bool``. See `Grader`.
    """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A string of everything that the rows depend on. The tokenized rows are cached under it."""

    @abstractmethod
    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows. Every call yields the same rows in the same order."""


@runtime_checkable
class Grader(Protocol):
    """A task that can check whether a response is right."""

    def grade(self, prompt: str, response: str) -> bool:
        """Check whether ``response`` is a right response to ``prompt``."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source."""

    fields: dict[str, Any]
    origin: str
    """Where to find the row: ``"data.jsonl:17"``, ``"data.parquet, row 17"``."""
    problem: str = ""
    """Why the row could not be read. Empty if it could."""


def read_rows(source: str | RowTask, *, split: str = "train") -> Iterator[Row]:
    """Yield the rows of a source in order.

    Args:
        source: A file (``.jsonl``, ``.jsonl.gz``, ``.parquet``, ``.csv``), a dataset of the hub as ``name``,
            ``name:split`` or ``name:config:split``, or a task. Blank lines of a JSON-lines file are ignored.
        split: The split of a hub dataset if its name does not include one.

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
    """Hash the content of a source. Files with the same content have the same fingerprint, regardless of their paths.

    Raises:
        ValueError: If the source is missing, a folder, empty, unreadable or of an unknown kind.
    """
    if isinstance(source, RowTask):
        return f"{type(source).__module__}.{type(source).__qualname__}:{source.fingerprint}"
    if _suffix(source) is None:
        # The fingerprint of the datasets library covers the revision and the files of a dataset. Nothing cheaper does.
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
            # Read bytes, not text: text mode would fail for a whole block of lines if only one of them is not UTF-8.
            for line_number, line in enumerate(lines, start=1):
                if line_number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                num_rows += 1
                yield _parse_line(line, origin=f"{path}:{line_number}")
        except (OSError, EOFError) as error:
            raise ValueError(
                f"{path}, after line {line_number}: cannot be read ({error}). The file may be incomplete. Download or write it"
                " again."
            ) from error
    if num_rows == 0:
        raise ValueError(f"{path} has no rows: expected one JSON object per line")


def _parse_line(line: bytes, *, origin: str) -> Row:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row({}, origin, f"is not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}")
    except (json.JSONDecodeError, RecursionError) as error:
        return Row({}, origin, f"is not JSON: {error}")
    except ValueError as error:  # a number with thousands of digits
        return Row({}, origin, f"cannot be read: {error}")
    if not isinstance(fields, dict):
        return Row({}, origin, f"is a JSON {type(fields).__name__}, expected an object with named fields")
    if _SURROGATE.search(line):
        for name, value in fields.items():
            try:
                json.dumps({name: value}, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start : error.start + 1]
                return Row({}, origin, f"has half a character, {half!r}, in field {name!r}: expected both halves or neither")
    return Row(fields, origin)


def _csv_rows(path: str) -> Iterator[Row]:
    num_rows = 0
    # The default limit of the csv module is 128 KiB per field. It applies to the whole process.
    csv.field_size_limit(2**31 - 1)
    with _open_binary(path) as raw:
        # Table libraries are not used because they convert "12" to a number and "NA" to a missing value, and do not report
        # line numbers.
        reader = csv.DictReader(TextIOWrapper(raw, encoding="utf-8-sig", newline=""), strict=True)
        try:
            for fields in reader:
                num_rows += 1
                problem = ""
                if None in fields or None in fields.values():
                    problem = f"has a different number of fields than the header ({', '.join(reader.fieldnames or ())})"
                yield Row({} if problem else dict(fields), f"{path}:{reader.line_num}", problem)
        except (csv.Error, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: cannot be read as CSV ({error})") from error
    if num_rows == 0:
        raise ValueError(f"{path} has no rows: expected a header line and at least one more line")


def _parquet_rows(path: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

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
        # Network, hub and builder errors have many classes, but mean the same to the user.
        raise ValueError(
            f"{name!r} is neither a file (searched in {Path.cwd()}{_near(name)}) nor a dataset that could be loaded "
            f"from the hub ({type(error).__name__}: {error}). Files end in {', '.join(SUFFIXES)}. Hub datasets are given as "
            "name, name:split or name:config:split."
        ) from error


def _suffix(path: str) -> str | None:
    """Return the known suffix of an existing file, or None for the name of a hub dataset."""
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
        raise ValueError(f"there is no file {path} (searched in {Path.cwd()}{_near(path)})")
    if suffix is None and exists:
        raise ValueError(f"{path} has an unknown file type: expected a name that ends in {', '.join(SUFFIXES)}")
    if suffix is None and not _HUB_NAME.fullmatch(path):
        raise ValueError(
            f"there is no file {path} (searched in {Path.cwd()}{_near(path)}), and it is not the name of a hub dataset either"
        )
    return suffix


def _near(path: str) -> str:
    """Suggest files that are similar to a path that does not exist."""
    parent = Path(path).parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    if parent != Path(path).parent:
        return f"; the folder {Path(path).parent} does not exist"
    names = sorted(f.name for f in parent.iterdir() if f.name.endswith(SUFFIXES))
    near = difflib.get_close_matches(Path(path).name, names, n=3) or names[:3]
    return f"; similar files: {', '.join(str(parent / name) for name in near)}" if near else ""


def _open_binary(path: str) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
