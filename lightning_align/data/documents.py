"""Sources of documents: a folder of text files, rows of a file or hub dataset, and Python's standard library."""

import codecs
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_align.data.remote import RemoteDocuments
from lightning_align.data.rows import read_rows, source_fingerprint
from lightning_align.data.sources import PIECE, DocumentSource
from lightning_align.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from lightning_align.data.tokenizer.pieces import continuing_model
from lightning_align.types import Document, MarkedText

Part = Literal["all", "train", "held_out"]
BATCH = 64
"""The number of documents per call of the tokenizer."""


class FolderDocuments(DocumentSource):
    """The text files of a folder. Each file is a document with its path in the folder as name. The paths are sorted.

    Args:
        folder: The path of the folder.
        glob: A pattern of the files to use, such as ``**/*.txt``, or a list of patterns.
        exclude: Patterns of files to leave out. A folder that matches, such as ``**/tests``, is left out with all its
            files.
        part: Which files to use: ``all``, or one side of a split, ``train`` or ``held_out``. The side of a file depends
            only on its path in the folder.
        held_out: The fraction of the files that the split holds out.
        on_bad_file: What to do with a file that is not UTF-8 text: ``fail`` raises an error that names the file, ``skip``
            leaves it out with a warning.

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
        on_bad_file: Literal["fail", "skip"] = "fail",
    ) -> None:
        self.folder = Path(folder)
        self.glob = [glob] if isinstance(glob, str) else list(glob)
        self.exclude = list(exclude or [])
        self.part, self.held_out, self.on_bad_file = part, held_out, on_bad_file
        if not self.folder.is_dir():
            what = "is a file: give its path itself as the source" if self.folder.exists() else "does not exist"
            raise ValueError(f"`folder` must be a folder, but {folder} {what} (searched from {Path.cwd()})")
        if part not in ("all", "train", "held_out"):
            raise ValueError(f"`part` must be 'all', 'train' or 'held_out', but got {part!r}")
        if not 0 < held_out < 1:
            raise ValueError(f"`held_out` must be a fraction between 0 and 1, but got {held_out}")

    @cached_property
    def files(self) -> list[str]:
        """The paths of the files, relative to the folder and sorted."""
        excluded = {path for pattern in self.exclude for path in self.folder.glob(pattern)}
        found = {path for pattern in self.glob for path in self.folder.glob(pattern) if path.is_file()}
        kept = (path for path in found if excluded.isdisjoint((path, *path.parents)))
        names = sorted(path.relative_to(self.folder).as_posix() for path in kept)
        if self.part != "all":
            names = [name for name in names if (_hash_to_unit(name) < self.held_out) == (self.part == "held_out")]
        if not names:
            raise ValueError(
                f"folder {self.folder} has no file that matches {', '.join(self.glob)}"
                f"{' and not ' + ', '.join(self.exclude) if self.exclude else ''} (part: {self.part}). Change `glob`."
            )
        return names

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names and contents of the files."""
        digest = hashlib.sha256()
        for name in self.files:
            with (self.folder / name).open("rb") as file:
                digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return f"folder:{digest.hexdigest()}:{self.on_bad_file}"

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource.documents`."""
        for document, rest in self.open_texts():
            yield Document(document.id, "".join([document.text, *rest])) if rest else document

    def open_texts(self) -> Iterator[tuple[Document, Iterable[str]]]:
        """See `DocumentSource.open_texts`."""
        for name in self.files:
            path = self.folder / name
            problem = _text_problem(path)
            if not problem:
                pieces = _pieces(path)
                yield Document(name, next(pieces, "")), (pieces if path.stat().st_size > PIECE else ())
                continue
            remedy = "Leave it out with `exclude` or `glob`, convert it, or set `on_bad_file` to 'skip'."
            if self.on_bad_file == "fail":
                raise ValueError(f"{path} is not a text file: {problem}. {remedy}")
            warnings.warn(f"{path} is skipped: {problem}", stacklevel=2)


def _pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file, `PIECE` bytes at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while content := file.read(PIECE):
            yield decoder.decode(content)
        decoder.decode(b"", final=True)


def _text_problem(path: Path) -> str:
    """Say why a file is not a text file. Empty if it is one."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            content = file.read(PIECE)
            before = len(decoder.getstate()[0])
            try:
                decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                return f"byte {start - before + error.start + 1} is {error.object[error.start]:#04x}, which is not UTF-8"
            if b"\0" in content:
                return f"byte {start + content.index(0) + 1} is 0, as in a binary file"
            if not content:
                return ""
            start += len(content)


class RowDocuments(DocumentSource):
    """The rows of a file (.jsonl, .jsonl.gz, .parquet, .csv) or of a hub dataset. Each row is a document.

    Args:
        rows: The path of the file, or the dataset as ``name``, ``name:split`` or ``name:config:split``.
        text: The field that holds the text.
        id: The field that holds the name of the document. Default is its number, counted from 1.
    """

    def __init__(self, rows: str, *, text: str = "text", id: str | None = None) -> None:
        self.rows, self.text, self.id = rows, text, id

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content of the file and the names of the fields."""
        return f"rows:{self.text}:{self.id}:{source_fingerprint(self.rows)}"

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
    """Create a source from a folder, a URL of object storage, a file of rows, or a hub dataset. A source is returned as is."""
    if isinstance(source, DocumentSource):
        return source
    if "://" in source:
        return RemoteDocuments(source)
    return FolderDocuments(source) if Path(source).is_dir() else RowDocuments(source)


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


def _hash_to_unit(name: str) -> float:
    """Hash a name to a number in [0, 1)."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
