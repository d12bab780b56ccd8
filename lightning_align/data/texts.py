"""Text files: which entries of a folder are text files, and reading them whole or piece by piece."""

import codecs
import gzip
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, cast

PACKED = (".gz", ".zst")
"""The suffixes of compressed text files, which are decompressed while they are read."""
LINES = (".jsonl", ".ndjson")
ROWS = (*LINES, ".parquet", ".arrow", ".csv")
DATABASE = frozenset(("database.json", ".build.lock"))
"""A folder with one of these files is a retrieval database, finished or at work. It is no text."""
UNREADABLE = "not readable by this user"
"""The reason of an entry that cannot be read."""
_CONVERTERS = {
    "PDF": "pdftotext or pypdf",
    "HTML": "trafilatura, or BeautifulSoup's get_text",
    "an office document": "pandoc --to plain",
    "an e-book": "pandoc --to plain",
}
_KINDS = {
    **dict.fromkeys((".pdf", ".ps", ".djvu"), "PDF"),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".mhtml"), "HTML"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".ppt", ".pptx", ".odp", ".xls", ".xlsx", ".ods"), "an office document"),
    **dict.fromkeys((".epub", ".mobi"), "an e-book"),
}
_BEGINNINGS = {b"%PDF-": "PDF", b"<!doctype html": "HTML", b"<html": "HTML", rb"{\rtf": "an office document"}
_PIECE = 1 << 20
"""The number of bytes that are read at a time."""
LONG = 1 << 22
"""The number of characters above which a text is not read as a whole; see `open_text`."""


class NotTextError(ValueError):
    """A file is not a text file. The message says why, and what to do."""


def document_name(relative: Path) -> str:
    r"""Return the name of a document: its path, with ``/``. Bytes of a file name that are not UTF-8 are written as ``\xe9``."""
    return os.fsencode(relative.as_posix()).decode("utf-8", errors="backslashreplace")


def list_entries(folder: Path, patterns: Sequence[str], exclude: Sequence[str]) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """List the files of a folder that match a pattern, and what is left out although its name may match.

    Args:
        folder: The folder.
        patterns: The patterns of the files.
        exclude: The patterns of the files and folders to leave out.

    Returns:
        The files by name, sorted, and the names of the entries that are left out, by the reason.
    """
    # A name at any depth is matched while the folder is walked, so that folders that are left out are not entered.
    tails = [tail for pattern in exclude if (tail := _any_depth(pattern))]
    excluded = {path for pattern in exclude if not _any_depth(pattern) for path in folder.glob(pattern)}
    names = [tail for pattern in patterns if (tail := _any_depth(pattern))]
    files: dict[str, Path] = {}
    odd: dict[str, set[str]] = {}

    def is_excluded(path: Path) -> bool:
        parts = path.relative_to(folder).parts if tails else ()
        return not excluded.isdisjoint((path, *path.parents)) or any(_matches(part, tails) for part in parts)

    def note(reason: str, path: str | Path) -> None:
        if not is_excluded(path := Path(path)):
            odd.setdefault(reason, set()).add(document_name(path.relative_to(folder)))

    found: list[tuple[str, Path]] = []
    for parent, folders, others in os.walk(folder, onerror=lambda error: note(UNREADABLE, error.filename)):
        if not DATABASE.isdisjoint(others) and Path(parent) != folder:
            note("a retrieval database", parent)
            excluded.add(Path(parent))
            folders.clear()
            continue
        folders[:] = [name for name in folders if not _matches(name, tails) and Path(parent, name) not in excluded]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                note("a link to a folder, which is not followed", os.path.join(parent, name))
        for name in (*folders, *others):
            found += ((f"**/{tail}", Path(parent, name)) for tail in names if fnmatch(name, tail) and not _matches(name, tails))
    for pattern in patterns:
        if not _any_depth(pattern):
            found += ((pattern, path) for path in folder.glob(pattern))
    for pattern, path in found:
        try:
            mode = path.stat().st_mode
        except OSError:
            note("a link that leads nowhere" if path.is_symlink() else UNREADABLE, path)
            continue
        if stat.S_ISREG(mode):
            if not is_excluded(path):
                files[document_name(path.relative_to(folder))] = path
        elif not stat.S_ISDIR(mode):
            note("a socket, a pipe or a device", path)
        elif "." in pattern.rpartition("/")[2] and not path.is_symlink():  # not a pattern of all folders, such as **/*
            note("a folder that is named like a file", path)
    return dict(sorted(files.items())), {reason: sorted(names) for reason, names in odd.items()}


def _any_depth(pattern: str) -> str | None:
    """Return what a pattern such as ``**/*.txt`` says of a name at any depth. None for other patterns."""
    head, _, tail = pattern.rpartition("/")
    return tail if head == "**" and tail not in ("", ".", "..", "**") else None


def _matches(name: str, tails: Sequence[str]) -> bool:
    return any(fnmatch(name, tail) for tail in tails)


def read_text(path: Path) -> str:
    """Read a text file of UTF-8. A file that ends in .gz or .zst is decompressed.

    Raises:
        NotTextError: If it is not a text file, or cannot be read.
    """
    return "".join(text_parts(path))


def open_text(path: Path) -> tuple[str, Iterable[str]]:
    """Open a text file that need not fit into memory; see `read_text`.

    Returns:
        The text and nothing, or the beginning of a long text and an iterator over the rest.

    Raises:
        NotTextError: If it is not a text file, or cannot be read. A long file is read to its end to find it out.
    """
    held: list[str] = []
    size, parts = 0, text_parts(path)
    for part in parts:
        held.append(part)
        size += len(part)
        if size > LONG:
            held.clear()
            for _ in parts:
                pass
            again = filter(None, text_parts(path))
            return next(again, ""), again
    return "".join(held), ()


def read_pieces(path: Path, separator: str) -> Iterator[str]:
    """Yield the texts between the separators of a file. The file is never in memory as a whole, only its longest piece.

    A line end of the separator also stands for a line end of Windows.

    Raises:
        NotTextError: If it is not a text file, or cannot be read.
    """
    pattern = re.compile("\r?\n".join(re.escape(line) for line in separator.split("\n")))
    held: list[str] = []
    tail = ""
    for part in text_parts(path):
        # A separator can begin in one part and end in the next. Only the end of what is held is searched again.
        text = tail + part
        *pieces, rest = pattern.split(text)
        for piece in pieces:
            yield "".join([*held, piece])
            held = []
        keep = len(separator) + separator.count("\n") - 1
        cut = max(0, len(rest) - keep)
        held.append(rest[:cut])
        tail = rest[cut:]
    yield "".join([*held, tail])


def text_parts(path: Path) -> Iterator[str]:
    """Yield a text file in parts; see `read_text`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    kind = _KINDS.get(Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix, "")
    # A table or a .json file can be text that is meant. Lines of JSON would give their field names and escapes to the model.
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(ROWS if path.name.endswith(PACKED) else LINES):
        raise NotTextError("it is a file of rows. Give its path itself as the source, not its folder, or use RowDocuments")
    try:
        with path.open("rb") as raw:
            file = _unpacked(path, raw)
            first = True
            while content := file.read(_PIECE):
                if first:
                    _check_beginning(content, kind)
                    first = False
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(content)
                except UnicodeDecodeError as error:
                    raise _not_utf8(error, position - pending) from error
                if "\0" in text:
                    raise NotTextError(f"byte {position + content.index(0) + 1} is 0, as in a binary file")
                position += len(content)
                yield text
            try:
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, position - len(error.object)) from error
    except FileNotFoundError as error:
        raise NotTextError("it is gone since the folder was listed. Build again when nothing changes the folder") from error
    except (OSError, EOFError) as error:  # gzip raises EOFError for a file that is cut
        raise NotTextError(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _not_utf8(error: UnicodeDecodeError, before: int) -> NotTextError:
    return NotTextError(f"byte {before + error.start + 1} is {error.object[error.start]:#04x}, which is not UTF-8")


def _check_beginning(content: bytes, kind: str) -> None:
    start = content[:256].removeprefix(b"\xef\xbb\xbf").lstrip()
    kind = kind or next((kind for magic, kind in _BEGINNINGS.items() if start.lower().startswith(magic.lower())), "")
    if kind:
        raise NotTextError(
            f"it is {kind}, and its markup would become tokens. Convert it to plain text first, such as with"
            f" {_CONVERTERS[kind]}"
        )
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise NotTextError(
            f"byte 1 is {content[0]:#04x}, which is not UTF-8 but begins UTF-16. Convert it with iconv -f UTF-16 -t UTF-8"
        )


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return cast("IO[bytes]", gzip.open(raw))
    if path.name.endswith(".zst"):
        import pyarrow as pa

        return cast("IO[bytes]", pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))
    return raw
