"""Where documents come from: files of a folder, rows of a file or of the hub, the sources of Python's standard library."""

import hashlib
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_align.data.rows import read_rows, source_fingerprint
from lightning_align.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from lightning_align.types import Document, MarkedText

Part = Literal["all", "train", "held_out"]
BATCH = 64
"""Documents that a tokenizer is given together."""


class DocumentSource(ABC):
    """A source of documents."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that the documents depend on."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yields the documents, the same ones in the same order at every call."""


class FolderDocuments(DocumentSource):
    """Text files of a folder, one document each, named by their paths in it and ordered by them.

    Args:
        folder: where they are.
        glob: which of them, such as ``**/*.txt``, or a list of such patterns.
        exclude: patterns of files to leave out, or of folders to leave out with all that is in them, such as ``**/tests``.
        part: all files, or those of one side of a split: a file is on the same side wherever the folder stands and
            whichever other files there are.
        held_out: share of the files that the split holds out.
        on_bad_file: what a file that is not UTF-8 text does: fail stops and names it, skip leaves it out with a warning.

    Raises:
        ValueError: if there is no such folder, no such file in it, or an argument is out of range.
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
            what = "a file, expected a folder: give a file of rows by its name alone" if self.folder.exists() else "not there"
            raise ValueError(f"folder {folder} is {what} (looked from {Path.cwd()})")
        if part not in ("all", "train", "held_out"):
            raise ValueError(f"part is {part!r}, expected all, train or held_out")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out}, expected a share between 0 and 1")

    @cached_property
    def files(self) -> list[str]:
        """Paths in the folder, sorted."""
        excluded = {path for pattern in self.exclude for path in self.folder.glob(pattern)}
        found = {path for pattern in self.glob for path in self.folder.glob(pattern) if path.is_file()}
        kept = (path for path in found if excluded.isdisjoint((path, *path.parents)))
        names = sorted(path.relative_to(self.folder).as_posix() for path in kept)
        if self.part != "all":
            names = [name for name in names if (_draw(name) < self.held_out) == (self.part == "held_out")]
        if not names:
            raise ValueError(
                f"folder {self.folder} has no file that matches {', '.join(self.glob)}"
                f"{' and not ' + ', '.join(self.exclude) if self.exclude else ''} (part: {self.part}): give another glob"
            )
        return names

    @cached_property
    def fingerprint(self) -> str:
        """Of the names and contents of the files."""
        digest = hashlib.sha256()
        for name in self.files:
            with (self.folder / name).open("rb") as file:
                digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return f"folder:{digest.hexdigest()}:{self.on_bad_file}"

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource`."""
        for name in self.files:
            content = (self.folder / name).read_bytes()
            problem = ""
            try:
                text = content.decode("utf-8")
                if "\0" in text:
                    problem = f"byte {content.index(0) + 1} is 0, so it is a binary file"
            except UnicodeDecodeError as error:
                problem = f"byte {error.start + 1} is {content[error.start]:#04x}, which is not UTF-8"
            if not problem:
                yield Document(name, text)
                continue
            remedy = "leave it out with `exclude` or `glob`, convert it, or set on_bad_file to skip"
            if self.on_bad_file == "fail":
                raise ValueError(f"{self.folder / name} is no text file: {problem}: {remedy}")
            warnings.warn(f"{self.folder / name} is left out: {problem}", stacklevel=2)


class RowDocuments(DocumentSource):
    """Rows of a file (.jsonl, .jsonl.gz, .parquet, .csv) or of a dataset of the hub, one document each.

    Args:
        rows: the file, or the dataset as name, name:split or name:config:split.
        text: field that holds the text.
        id: field that names a document; by default its number, counted from 1.
    """

    def __init__(self, rows: str, *, text: str = "text", id: str | None = None) -> None:
        self.rows, self.text, self.id = rows, text, id

    @cached_property
    def fingerprint(self) -> str:
        """Of the content of the file."""
        return f"rows:{self.text}:{self.id}:{source_fingerprint(self.rows)}"

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource`."""
        for number, row in enumerate(read_rows(self.rows), start=1):
            name, text = str(number) if self.id is None else row.fields.get(self.id), row.fields.get(self.text)
            if row.problem:
                raise ValueError(f"{row.origin} {row.problem}")
            if not isinstance(text, str) or name is None:
                field, value = (self.text, text) if not isinstance(text, str) else (self.id, name)
                raise ValueError(
                    f"{row.origin} has {value!r:.40} as {field!r}, expected a text; its fields are {', '.join(row.fields)}"
                )
            yield Document(str(name), text)


LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__")


class StandardLibrary(FolderDocuments):
    """The sources of the standard library of the Python that runs, its tests and installed packages left out.

    So is `pydoc_data`, one file of prose that is as long as fifty of the others.

    Args:
        part: all files, or those of one side of a split.
        held_out: share of the files that the split holds out.
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
    """A source by what a user writes: a folder, a file of rows, or a name of the hub."""
    if isinstance(source, DocumentSource):
        return source
    return FolderDocuments(source) if Path(source).is_dir() else RowDocuments(source)


class DocumentTokenizer:
    """A tokenizer for whole documents: ids as arrays, and the places of few tokens instead of all.

    Args:
        tokenizer: of the suite.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id

    def encode(self, texts: Sequence[str], *, start: int, step: int) -> Iterator[MarkedText]:
        """Encode each text.

        Args:
            texts: the documents.
            start: number of the first token whose place is wanted.
            step: from there to the next such token.
        """
        if isinstance(self.tokenizer, ByteTokenizer):
            yield from (self._bytes(text, start, step) for text in texts)
        elif isinstance(self.tokenizer, FileTokenizer):
            # Few at a time: a token of the library takes fifty times the room of its id.
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
        """The ids of each text alone."""
        if isinstance(self.tokenizer, ByteTokenizer):
            yield from (np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + 3 for text in texts)
        elif isinstance(self.tokenizer, FileTokenizer):
            for first in range(0, len(texts), BATCH):
                for encoding in self.tokenizer.raw_batch(texts[first : first + BATCH], offsets=False):
                    yield np.array(encoding.ids, dtype=np.int64)
        else:
            yield from (np.array(plain.ids, dtype=np.int64) for plain in self.tokenizer.encode_batch(texts))

    @staticmethod
    def _bytes(text: str, start: int, step: int) -> MarkedText:
        content = np.frombuffer(text.encode(), dtype=np.uint8)
        marks = np.arange(start, len(content), step)
        if not text.isascii():
            # A character begins at each byte that is no continuation byte; a token within one has that one's place.
            marks = np.cumsum((content & 0xC0) != 0x80)[marks] - 1
        return MarkedText(content.astype(np.int64) + 3, marks.tolist())


def _draw(name: str) -> float:
    """A number from 0 to 1 that a name decides on."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
