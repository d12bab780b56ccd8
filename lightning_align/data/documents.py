"""Sources of documents: text files, rows of a file or hub dataset, and Python's standard library."""

import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_align.data.remote import RemoteDocuments
from lightning_align.data.rows import SUFFIXES, read_rows, source_files
from lightning_align.data.sources import DocumentSource as DocumentSource
from lightning_align.data.texts import UNREADABLE, NotTextError, document_name, list_entries, open_text, read_pieces
from lightning_align.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from lightning_align.data.tokenizer.pieces import continuing_model
from lightning_align.types import Document, MarkedText

Part = Literal["all", "train", "held_out"]
BATCH = 64
"""The number of documents per call of the tokenizer."""


class FolderDocuments(DocumentSource):
    """The text files of a folder. Each file is a document with its path in the folder as name. The paths are sorted.

    Files that end in .gz or .zst are decompressed. Links to folders are not followed. They, links that lead nowhere, sockets
    and folders that cannot be read are named in a warning.

    Args:
        folder: The path of the folder.
        glob: A pattern of the files to use, such as ``**/*.txt``, or a list of patterns.
        exclude: Patterns of files to leave out. A folder that matches, such as ``**/tests``, is left out with all its
            files.
        part: Which files to use: ``all``, or one side of a split, ``train`` or ``held_out``. The side of a file depends
            only on its path in the folder.
        held_out: The fraction of the files that the split holds out.
        separator: The text between two documents of a file, such as ``<|endoftext|>``. The documents are named
            ``<path>#<number>``, counted from 1. Default is that each file is one document.
        on_bad_file: What to do with a file that is not UTF-8 text, or is PDF, HTML or an office document: ``fail`` raises an
            error that names the file, ``skip`` leaves it out with a warning.

    Raises:
        ValueError: If there is no such folder, no file matches, or an argument is out of range.
    """

    def __init__(
        self,
        folder: str,
        *,
        glob: str | list[str] = "**/*",
        exclude: list[str] | None = None,
        part: Part = "all",
        held_out: float = 0.1,
        separator: str | None = None,
        on_bad_file: Literal["fail", "skip"] = "fail",
    ) -> None:
        self.folder = Path(folder)
        self.glob = [glob] if isinstance(glob, str) else list(glob)
        self.exclude = list(exclude or [])
        self.part, self.held_out, self.on_bad_file = part, held_out, on_bad_file
        self.separator = _checked_separator(separator)
        self._said: set[str] = set()
        if not self.folder.is_dir():
            what = "is a file: give its path itself as the source" if self.folder.exists() else "does not exist"
            raise ValueError(f"`folder` must be a folder, but {folder} {what} (searched from {Path.cwd()})")
        _check_part(part, held_out)

    @property
    def files(self) -> list[str]:
        """The names of the files: their paths, relative to the folder, sorted. The folder is listed at each access."""
        return list(self._paths()[0])

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """See `DocumentSource.stamps`."""
        return {name: _stamp(path) for name, path in self._paths()[0].items()}

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource.documents`. Nothing is remembered from an earlier call: the files are listed and read again."""
        return _whole(self.open_texts())

    def open_texts(self) -> Iterator[tuple[Document, Iterable[str]]]:
        """See `DocumentSource.open_texts`."""
        paths, odd = self._paths()
        remedy = "Leave it out with `exclude` or `glob`, convert it, or set `on_bad_file` to 'skip'."
        for reason, names in odd.items():
            more = "" if len(names) <= 3 else f" and {len(names) - 3} more"
            message = f"{self.folder}: left out {len(names)} ({', '.join(names[:3])}{more}): {reason}"
            if reason == UNREADABLE and self.on_bad_file == "fail":
                raise ValueError(f"{message}. Change the permissions, or set `on_bad_file` to 'skip'.")
            self._warn(message)
        for name, path in paths.items():
            try:
                if self.separator is None:
                    text, rest = open_text(path)
                    yield Document(name, text), rest
                else:
                    yield from ((each, ()) for each in _numbered(name, read_pieces(path, self.separator)))
            except NotTextError as error:
                if self.on_bad_file == "fail":
                    raise ValueError(f"{self.folder / name} is not a text file: {error}. {remedy}") from error
                self._warn(f"{self.folder / name} is skipped: {error}")

    def _paths(self) -> tuple[dict[str, Path], dict[str, list[str]]]:
        found, odd = list_entries(self.folder, self.glob, self.exclude)
        held_out = self.part == "held_out"
        paths = {n: p for n, p in found.items() if self.part == "all" or _is_held_out(n, self.held_out) == held_out}
        if not paths:
            remedy = "Add text files, or change `glob`."
            if found:
                remedy = (
                    f"{len(found)} match, but are in the other part. Change `held_out`, which is {self.held_out}, or add files."
                    " One big file can be cut into documents with a `separator`, and FileDocuments splits these."
                )
            raise ValueError(
                f"folder {self.folder} has no file that matches {', '.join(self.glob)}"
                f"{' and not ' + ', '.join(self.exclude) if self.exclude else ''} (part: {self.part}). {remedy}"
            )
        return paths, odd

    def _warn(self, message: str) -> None:
        if message not in self._said:  # a build reads the documents twice
            self._said.add(message)
            warnings.warn(message, stacklevel=3)


class FileDocuments(DocumentSource):
    """The documents of one text file, which a separator divides. A file that ends in .gz or .zst is decompressed.

    Args:
        path: The path of the file.
        separator: The text between two documents, such as an empty line (two line ends, of any system) or ``<|endoftext|>``.
            Default is that the file is one document. No chunk of it then has a neighbor of the same file.
        part: Which documents to use: ``all``, or one side of a split, ``train`` or ``held_out``. The side of a document depends
            only on its text.
        held_out: The fraction of the documents that the split holds out.

    Raises:
        ValueError: If there is no such file, or an argument is out of range.
    """

    def __init__(self, path: str, *, separator: str | None = None, part: Part = "all", held_out: float = 0.1) -> None:
        self.path, self.separator = Path(path), _checked_separator(separator)
        self.part, self.held_out = part, held_out
        _check_part(part, held_out)
        if not self.path.is_file():
            raise ValueError(f"`path` must be a text file, but got {path} (searched from {Path.cwd()})")

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """See `DocumentSource.stamps`."""
        return {self.path.name: _stamp(self.path)}

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource.documents`. The documents are named ``<file>#<number>``, counted from 1."""
        return _whole(self.open_texts())

    def open_texts(self) -> Iterator[tuple[Document, Iterable[str]]]:
        """See `DocumentSource.open_texts`. A document between two separators is read whole."""
        name = document_name(Path(self.path.name))
        num_texts = num_used = 0
        try:
            for document, rest in self._opened(name):
                num_texts += 1
                # The text of a long document is read once more to tell its side.
                again = () if self.part == "all" or not rest else open_text(self.path)[1]
                if self.part == "all" or _is_held_out(document.text, self.held_out, again) == (self.part == "held_out"):
                    num_used += 1
                    yield document, rest
        except NotTextError as error:
            raise ValueError(f"{self.path} is not a text file: {error}.") from error
        if not num_used and self.part != "all":
            raise ValueError(
                f"{self.path} has no document in the part {self.part!r}: all {num_texts} are in the other part. Change"
                f" `held_out`, which is {self.held_out}, or use a `separator` that gives more documents."
            )

    def _opened(self, name: str) -> Iterator[tuple[Document, Iterable[str]]]:
        if self.separator is None:
            text, rest = open_text(self.path)
            yield Document(name, text), rest
        else:
            yield from ((document, ()) for document in _numbered(name, read_pieces(self.path, self.separator)))


class RowDocuments(DocumentSource):
    """The rows of a file (.jsonl, .json, .csv, also with .gz or .zst, .parquet) or of a hub dataset. Each row is a document.

    Args:
        rows: The path of the file, or the dataset as ``name``, ``name:split`` or ``name:config:split``.
        text: The field that holds the text.
        id: The field that holds the name of the document. Default is its number, counted from 1.
    """

    def __init__(self, rows: str, *, text: str = "text", id: str | None = None) -> None:
        self.rows, self.text, self.id = rows, text, id

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """See `DocumentSource.stamps`."""
        return {name: _stamp(Path(name)) for name in source_files(self.rows) or ()}

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource.documents`."""
        for number, row in enumerate(read_rows(self.rows), start=1):
            name, text = str(number) if self.id is None else row.fields.get(self.id), row.fields.get(self.text)
            if row.problem:
                raise ValueError(f"{row.origin} {row.problem}")
            if not isinstance(text, str) or name is None:
                field, value = (self.text, text) if not isinstance(text, str) else (self.id, name)
                raise ValueError(
                    f"{row.origin}: the field {field!r} must be a string, but got {value!r:.40}. The fields of the row are"
                    f" {', '.join(row.fields)}."
                )
            yield Document(str(name), text)


LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__")


class StandardLibrary(FolderDocuments):
    """The source files of the standard library of the running Python.

    Tests and installed packages are left out. So is `pydoc_data`, because it is one text as long as fifty other files.

    Args:
        part: Which files to use: ``all``, or one side of a split, ``train`` or ``held_out``.
        held_out: The fraction of the files that the split holds out.
    """

    def __init__(self, *, part: Part = "all", held_out: float = 0.1) -> None:
        super().__init__(
            sysconfig.get_paths()["stdlib"],
            glob="**/*.py",
            exclude=[f"**/{name}" for name in LEFT_OUT],
            part=part,
            held_out=held_out,
            on_bad_file="skip",
        )


def load_documents(source: str | DocumentSource) -> DocumentSource:
    """Create a source from a folder, a file, a URL of object storage or a hub dataset. A `DocumentSource` is returned as is."""
    if isinstance(source, DocumentSource):
        return source
    if "://" in source:
        return RemoteDocuments(source)
    if Path(source).is_dir():
        return FolderDocuments(source)
    return FileDocuments(source) if Path(source).is_file() and not source.endswith(SUFFIXES) else RowDocuments(source)


class DocumentTokenizer:
    """A tokenizer for whole documents. It returns ids as arrays, and the character positions of some tokens only.

    Args:
        tokenizer: The tokenizer to use.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        self._continuing: Any = continuing_model(tokenizer)

    def encode(self, texts: Sequence[str], *, start: int, step: int) -> Iterator[MarkedText]:
        """Encode each text, with the character positions of the tokens ``start``, ``start + step``, ``start + 2 * step`` ...

        Args:
            texts: The documents.
            start: The index of the first token whose position is returned.
            step: The number of tokens from one such token to the next.
        """
        if isinstance(self.tokenizer, ByteTokenizer):
            yield from (self._bytes(text, start, step) for text in texts)
        elif isinstance(self.tokenizer, FileTokenizer):
            # In small batches: a token of the library takes 50 times the memory of its id.
            for first in range(0, len(texts), BATCH):
                for encoding in self.tokenizer.raw_batch(texts[first : first + BATCH]):
                    ids = np.array(encoding.ids, dtype=np.int64)
                    spans = (encoding.token_to_chars(place) for place in range(start, len(ids), step))
                    yield MarkedText(ids, [span[0] for span in spans if span is not None])
        else:
            for plain in self.tokenizer.encode_batch(texts):
                marks = [plain.offsets[place][0] for place in range(start, len(plain.ids), step)]
                yield MarkedText(np.array(plain.ids, dtype=np.int64), marks)

    def ids(self, texts: Sequence[str]) -> Iterator[NDArray[np.int64]]:
        """Yield the ids of each text, without character positions."""
        if isinstance(self.tokenizer, ByteTokenizer):
            yield from (np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + 3 for text in texts)
        elif isinstance(self.tokenizer, FileTokenizer):
            for first in range(0, len(texts), BATCH):
                for encoding in self.tokenizer.raw_batch(texts[first : first + BATCH], offsets=False):
                    yield np.array(encoding.ids, dtype=np.int64)
        else:
            yield from (np.array(plain.ids, dtype=np.int64) for plain in self.tokenizer.encode_batch(texts))

    def split_point(self, text: str) -> int:
        """Return a place in a text such that what is before it has the same ids, whatever follows the text. 0 if unknown."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return len(text)
        return int(getattr(self.tokenizer, "split_point", lambda text: 0)(text))

    def part(self, text: str, *, is_first: bool) -> MarkedText:
        """Encode a part of a text, with the character position of each token.

        Args:
            text: The part.
            is_first: Whether it begins its text. A tokenizer that begins each text with a space does not do so for others.
        """
        if is_first or self._continuing is None:
            return next(iter(self.encode([text], start=0, step=1)))
        encoding = self._continuing.encode(text, add_special_tokens=False)
        return MarkedText(np.array(encoding.ids, dtype=np.int64), [start for start, _ in encoding.offsets])

    def part_ids(self, text: str, *, is_first: bool) -> NDArray[np.int64]:
        """Encode a part of a text, without character positions."""
        if is_first or self._continuing is None:
            return next(iter(self.ids([text])))
        return np.array(self._continuing.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    @staticmethod
    def _bytes(text: str, start: int, step: int) -> MarkedText:
        content = np.frombuffer(text.encode(), dtype=np.uint8)
        marks = np.arange(start, len(content), step)
        if not text.isascii():
            # A character starts at each byte that is not a continuation byte. A token within a character has its position.
            marks = np.cumsum((content & 0xC0) != 0x80)[marks] - 1
        return MarkedText(content.astype(np.int64) + 3, marks.tolist())


def _whole(opened: Iterator[tuple[Document, Iterable[str]]]) -> Iterator[Document]:
    """Join the text of each document."""
    for document, rest in opened:
        yield Document(document.id, "".join([document.text, *rest])) if rest else document


def _numbered(name: str, pieces: Iterator[str]) -> Iterator[Document]:
    """Name the pieces of a file that are not blank."""
    texts = (piece for piece in pieces if piece.strip())
    yield from (Document(f"{name}#{number}", text) for number, text in enumerate(texts, start=1))


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _check_part(part: str, held_out: float) -> None:
    if part not in ("all", "train", "held_out"):
        raise ValueError(f"`part` must be 'all', 'train' or 'held_out', but got {part!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out` must be a fraction between 0 and 1, but got {held_out}")


def _checked_separator(separator: str | None) -> str | None:
    if separator == "":
        raise ValueError("`separator` must be a text such as '\\n\\n', but got an empty one. Leave it out for one document.")
    return separator


def _is_held_out(name: str, share: float, rest: Iterable[str] = ()) -> bool:
    """Whether the hash of a name or text and its rest, as a number in [0, 1), is below a share."""
    found = hashlib.sha256()
    for part in chain([name], rest):
        found.update(part.encode("utf-8", errors="surrogatepass"))
    return int(found.hexdigest()[:8], 16) / 16**8 < share
