"""Reading of rows from files: JSON lines, JSON arrays, CSV, Parquet and Arrow.

Files of JSON and CSV may be compressed with gzip (`.gz`) or Zstandard (`.zst`). Every reader holds a part of its file in
memory, never all of it.
"""

import codecs
import difflib
import glob
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO, Any, cast

from lightning_align.data.parsing import csv_rows, doubled_name
from lightning_align.data.tables import parse_batch, table_batches

_TEXT = (".jsonl", ".ndjson", ".json", ".csv")
KINDS = (*_TEXT, ".parquet", ".arrow")
SUFFIXES = (*KINDS, *(kind + packed for kind in _TEXT for packed in (".gz", ".zst")))
SUFFIXES_TEXT = f"{', '.join(KINDS)} (text files also with .gz or .zst)"
"""The suffixes, for messages."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""A surrogate: one of the two escapes that JSON uses for some characters. JSON allows one alone, UTF-8 does not."""
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
_SPACE = re.compile(r"\s*")
_CHUNK = 1 << 20
_AGAIN = "The file may be incomplete. Download or write it again."
_LINE_BYTES = 1 << 19
"""The number of bytes in a block of lines, at least one line."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source."""

    fields: dict[str, Any]
    origin: str
    """Where to find the row: ``"data.jsonl:17"``, ``"data.parquet, row 17"``."""
    problem: str = ""
    """Why the row could not be read. Empty if it could."""


def expand_path(source: str, *, split: str) -> list[str] | None:
    """List the files of a source, in the order in which they are read.

    Args:
        source: A file, a folder of files, a pattern with ``*``, ``?`` or ``[...]``, or a folder that
            `datasets.save_to_disk` wrote, which may be followed by ``:split``.
        split: The split of a folder of several splits if the source does not name one.

    Returns:
        The files. The files of a folder or a pattern are sorted by name. None if the source may be the name of a dataset
        of the hub.

    Raises:
        ValueError: If a file or a folder is missing, cannot be read, or is of an unknown kind.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return _folder_files(path, split=split)
        exists = path.is_file()
        folder, colon, named = source.rpartition(":")
        if not exists and colon and Path(folder).is_dir():
            return _folder_files(Path(folder), split=named, named=True)
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error})") from error
    known = source.endswith(SUFFIXES)
    if exists:
        if not known:
            raise ValueError(f"{source} has an unknown file type: expected a name that ends in {SUFFIXES_TEXT}")
        return [source]
    if glob.has_magic(source):
        return _matching_files(source)
    if known:
        raise ValueError(f"there is no file {source} (searched in {Path.cwd()}{near(source)})")
    return None


def read_file(path: str, *, opened: list[BufferedReader] | None = None) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        path: The file.
        opened: A list that the open file is added to, so that the caller can ask for its position.

    Raises:
        ValueError: If the file cannot be read.
    """
    kind = kind_of(path)
    if kind == ".csv":
        return _csv_rows(path, opened)
    if kind == ".json":
        return _json_rows(path, opened)
    if kind in (".parquet", ".arrow"):
        return _table_rows(path)
    return _json_lines(path, opened)


def hash_file(path: str) -> str:
    """Hash the content of a file, together with its kind."""
    with _open_binary(path) as file:
        suffix = kind_of(path) + next((packed for packed in (".gz", ".zst") if path.endswith(packed)), "")
        return f"{suffix}:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def near(path: str) -> str:
    """Suggest files that are similar to a path that does not exist."""
    parent = Path(path).parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    if parent != Path(path).parent:
        return f"; the folder {Path(path).parent} does not exist"
    names = sorted(f.name for f in parent.iterdir() if f.name.endswith(SUFFIXES))
    close = difflib.get_close_matches(Path(path).name, names, n=3) or names[:3]
    return f"; similar files: {', '.join(str(parent / name) for name in close)}" if close else ""


def kind_of(path: str) -> str:
    """Return the suffix of a file, without that of its compression."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    return next(kind for kind in KINDS if name.endswith(kind))


# -- sets of files


def _folder_files(folder: Path, *, split: str, named: bool = False) -> list[str]:
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        if split not in names:
            raise ValueError(
                f"{folder} has no split {split!r}. Choose one of {', '.join(f'{folder}:{name}' for name in names)}"
            )
        return _folder_files(folder / split, split=split)
    if named:
        raise ValueError(f"{folder} has no splits to choose {split!r} from. Name its files with a pattern, such as {folder}/*")
    state = folder / "state.json"
    if state.is_file():
        content = json.loads(state.read_text(encoding="utf-8"))
        return [str(folder / file["filename"]) for file in content["_data_files"]]
    files = sorted(str(f) for f in folder.iterdir() if f.is_file() and f.name.endswith(SUFFIXES) and f.name[0] not in "._")
    if not files:
        raise ValueError(f"{folder} is a folder without files of rows. Files end in {SUFFIXES_TEXT}")
    for what, found in (
        ("splits", {match[1].lower() for file in files if (match := _SPLIT.match(Path(file).name))}),
        ("kinds", {kind_of(file) for file in files}),
    ):
        if len(found) > 1:
            raise ValueError(
                f"{folder} has files of several {what} ({', '.join(sorted(found))}). Name the files of one with a pattern, such"
                f" as {folder}/{f'{min(found)}*' if what == 'splits' else f'*{min(found)}'}"
            )
    return files


def _matching_files(pattern: str) -> list[str]:
    files = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
    if not files:
        raise ValueError(f"no file matches {pattern} (searched in {Path.cwd()}{near(pattern)})")
    if unknown := [file for file in files if not file.endswith(SUFFIXES)]:
        raise ValueError(f"{pattern} matches {unknown[0]}, which has an unknown file type. Files end in {SUFFIXES_TEXT}")
    return files


# -- files


def _open_binary(path: str) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


@contextmanager
def _open_unpacked(path: str, opened: list[BufferedReader] | None) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed. Add the open file itself to a list."""
    with _open_binary(path) as raw:
        if opened is not None:
            opened.append(raw)
        if path.endswith(".gz"):
            yield cast("IO[bytes]", gzip.open(raw))
        elif path.endswith(".zst"):
            yield _open_zstandard(path, raw)
        else:
            yield raw


def _open_zstandard(path: str, raw: BufferedReader) -> IO[bytes]:
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise ValueError(f"{path} cannot be read: the installed pyarrow was built without Zstandard. Decompress the file")
    return BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))


def line_blocks(path: str, opened: list[BufferedReader] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file in blocks: the number of the first line, from 1, and the lines.

    Raises:
        ValueError: If the file cannot be read.
    """
    first, lines, num_bytes = 1, list[bytes](), 0
    with _open_unpacked(path, opened) as file:
        problem: Exception | None = None
        try:
            # Read bytes, not text: text mode would fail for a whole block of lines if only one of them is not UTF-8.
            for line in file:
                lines.append(line)
                num_bytes += len(line)
                if num_bytes >= _LINE_BYTES:
                    yield first, b"".join(lines)
                    first, lines, num_bytes = first + len(lines), [], 0
        except (OSError, EOFError) as error:
            problem = error
        if lines:
            yield first, b"".join(lines)
        if problem is not None:
            raise ValueError(f"{path}, after line {first - 1 + len(lines)}: cannot be read ({problem}). {_AGAIN}") from problem


def parse_lines(path: str, first: int, lines: bytes) -> Iterator[Row]:
    """Yield the rows of a block of lines."""
    for number, line in enumerate(BytesIO(lines), start=first):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield _parse_line(content, origin=f"{path}:{number}")


def _json_lines(path: str, opened: list[BufferedReader] | None) -> Iterator[Row]:
    for first, lines in line_blocks(path, opened):
        yield from parse_lines(path, first, lines)


def _parse_line(line: bytes, *, origin: str) -> Row:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row({}, origin, f"is not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}")
    except (json.JSONDecodeError, RecursionError) as error:
        return Row({}, origin, f"is not JSON: {error}. Each line of such a file must be one whole object")
    except ValueError as error:  # a number with thousands of digits
        return Row({}, origin, f"cannot be read: {error}")
    return _checked(fields, origin, line)


def _checked(fields: Any, origin: str, spelled: bytes) -> Row:
    if not isinstance(fields, dict):
        array = ". A file that is one array must be named .json" if isinstance(fields, list) else ""
        return Row({}, origin, f"is a JSON {type(fields).__name__}, expected an object with named fields{array}")
    # A name that the text has once is not doubled. The exact check is slow.
    if any(spelled.count(f'"{name}"'.encode(errors="surrogatepass")) > 1 for name in fields) and (
        doubled := doubled_name(spelled)
    ):
        return Row({}, origin, f"has the field {doubled!r} twice, so its value is not certain: expected each name once")
    if _SURROGATE.search(spelled):
        for name, value in fields.items():
            try:
                json.dumps({name: value}, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start : error.start + 1]
                return Row({}, origin, f"has half a character, {half!r}, in field {name!r}: expected both halves or neither")
    return Row(fields, origin)


def _json_rows(path: str, opened: list[BufferedReader] | None) -> Iterator[Row]:
    """Yield the rows of a ``.json`` file: the objects of one array, or JSON lines."""
    with _open_unpacked(path, opened) as file:
        start = b""
        try:
            while not start.strip() and (more := file.read(64)):
                start = (start + more).removeprefix(b"\xef\xbb\xbf")
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error})") from error
        if start.lstrip()[:1] == b"[":
            yield from _array_rows(path, file, start)
            return
    for number, row in enumerate(_json_lines(path, opened)):
        if number == 0 and row.problem.startswith("is not JSON"):
            raise ValueError(
                f"{row.origin} {row.problem}. Expected a .json file to hold one array of objects, or one object per line"
            )
        yield row


class _Text:
    """The decoded text of a file, of which only the part that is being read is held."""

    def __init__(self, path: str, file: IO[bytes], start: bytes) -> None:
        self.path, self.file, self.text, self.position = path, file, "", 0
        self.num_lines = 0
        """The number of line breaks in the text that was dropped."""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._start = start

    def more(self) -> bool:
        """Read on: as much as is held, so that a long value is not parsed again and again. False at the end of the file."""
        try:
            new = self._start or self.file.read(max(_CHUNK, len(self.text) - self.position))
            text = self._decoder.decode(new, final=not new)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}, after line {self.line}: cannot be read ({error})") from error
        self._start = b""
        self.num_lines += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :] + text, 0
        return bool(new)

    @property
    def line(self) -> int:
        """The number of the line of the position, from 1."""
        return self.num_lines + self.text.count("\n", 0, self.position) + 1

    def next(self) -> str:
        """Return the next character that is not a space, and go to it. Empty at the end of the file."""
        while True:
            self.position = cast("re.Match[str]", _SPACE.match(self.text, self.position)).end()
            if self.position < len(self.text) or not self.more():
                return self.text[self.position : self.position + 1]


def _array_rows(path: str, file: IO[bytes], start: bytes) -> Iterator[Row]:
    text, decoder, number = _Text(path, file, start), json.JSONDecoder(), 0

    def broken(problem: object) -> ValueError:
        return ValueError(f"{path}:{text.line}, after row {number}: is not a JSON array of objects ({problem})")

    text.next()
    text.position += 1
    if text.next() == "]":
        return
    while True:
        text.next()
        while True:
            try:
                value, end = decoder.raw_decode(text.text, text.position)
                problem: Exception | None = None
            except (json.JSONDecodeError, RecursionError) as error:
                value, end, problem = None, len(text.text), error
            except ValueError as error:
                raise broken(error) from error
            # A value that ends where the text ends may go on.
            if end < len(text.text) or not text.more():
                break
        if problem is not None:
            raise broken(problem) from problem
        number += 1
        spelled = text.text[text.position : end]
        yield _checked(value, f"{path}, row {number}", spelled.encode(errors="surrogatepass"))
        text.position = end
        character = text.next()
        if character not in (",", "]"):
            raise broken(f"expected ',' or ']', but got {character!r}" if character else "it ends without ']'")
        text.position += 1
        if character == "]":
            if rest := text.next():
                raise broken(f"{rest!r} follows its end")
            return


def _csv_rows(path: str, opened: list[BufferedReader] | None) -> Iterator[Row]:
    with _open_unpacked(path, opened) as raw:
        for number, fields, problem in csv_rows(path, raw):
            yield Row(fields, f"{path}:{number}", problem)


def _table_rows(path: str) -> Iterator[Row]:
    for first, batch, _ in read_table(path):
        yield from table_rows(path, first, batch)


def read_table(path: str) -> Iterator[tuple[int, Any, float]]:
    """Yield the rows of a Parquet or Arrow file in batches; see `table_batches`."""
    with _open_binary(path) as raw:
        yield from table_batches(path, kind_of(path), raw)


def table_rows(path: str, first: int, batch: Any) -> Iterator[Row]:
    """Yield the rows of a batch of a table, of which the first one has a number."""
    for fields, origin in parse_batch(path, kind_of(path), first, batch):
        yield Row(fields, origin)
