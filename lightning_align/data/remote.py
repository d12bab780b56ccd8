"""Documents in object storage and other places that fsspec reads, by URL."""

import codecs
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from lightning_align.data.sources import PIECE, DocumentSource
from lightning_align.types import Document


class RemoteDocuments(DocumentSource):
    """The text files below a URL, such as ``s3://bucket/texts``. Each file is a document, named by its path below the URL.

    Files are read a piece at a time and are not copied to the disk. A file of several gigabytes is read in bounded memory.

    Args:
        url: A URL that fsspec can list: ``memory://``, ``file://``, ``s3://`` (with s3fs installed), ``gs://`` (with gcsfs) ...
        glob: A pattern of the paths below the URL to use, such as ``*.txt``, in which ``*`` also stands for slashes.
        **options: Options of the file system, such as credentials. They do not enter the fingerprint.

    Raises:
        ValueError: If the protocol is unknown, its package is not installed, or no file matches.
    """

    def __init__(self, url: str, *, glob: str = "*", **options: Any) -> None:
        import fsspec

        self.url, self.glob = url, glob
        try:
            self._files, root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise ValueError(f"`url` must be a URL that fsspec can read, but got {url!r} ({error}).") from error
        self._root = root.rstrip("/")

    @cached_property
    def files(self) -> list[str]:
        """The paths of the files below the URL, sorted."""
        names = (path.removeprefix(self._root).lstrip("/") for path in self._files.find(self._root))
        found = sorted(name for name in names if fnmatch.fnmatchcase(name, self.glob))
        if not found:
            raise ValueError(f"`url` must have files that match {self.glob!r}, but {self.url} has none. Change `glob`.")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names and contents of the files. It reads them all."""
        digest = hashlib.sha256()
        for name in self.files:
            content = hashlib.sha256()
            for piece in self._read(name):
                content.update(piece)
            digest.update(f"{name}\0{content.hexdigest()}\n".encode())
        return f"remote:{digest.hexdigest()}"

    def documents(self) -> Iterator[Document]:
        """See `DocumentSource.documents`."""
        for document, rest in self.open_texts():
            yield Document(document.id, document.text + "".join(rest))

    def open_texts(self) -> Iterator[tuple[Document, Iterable[str]]]:
        """See `DocumentSource.open_texts`.

        Raises:
            ValueError: If a file is not UTF-8 text.
        """
        for name in self.files:
            pieces = self._decode(name)
            yield Document(name, next(pieces, "")), pieces

    def _read(self, name: str) -> Iterator[bytes]:
        with self._files.open(f"{self._root}/{name}" if name else self._root, "rb") as file:
            while content := file.read(PIECE):
                yield content

    def _decode(self, name: str) -> Iterator[str]:
        decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
        for content in self._read(name):
            try:
                yield decoder.decode(content)
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.url}: {name} is not UTF-8 near byte {start + error.start + 1}.") from error
            start += len(content)
        if decoder.getstate()[0]:
            raise ValueError(f"{self.url}: {name} ends within a character, so it is not complete UTF-8 text.")
