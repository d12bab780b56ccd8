"""Documents in object storage and other places that fsspec reads, by URL."""

import codecs
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning_align.data.sources import PIECE, DocumentSource
from lightning_align.types import Document


class RemoteDocuments(DocumentSource):
    """The text files below a URL, such as ``s3://bucket/texts``. Each file is a document, named by its path below the URL.

    Files are read a piece at a time and are not copied to the disk. A file of several gigabytes is read in bounded memory.

    Args:
        url: A URL that fsspec can list: ``memory://``, ``file://``, ``s3://`` (with s3fs installed), ``gs://`` (with gcsfs) ...
        glob: A pattern of the paths below the URL to use, such as ``*.txt``, in which ``*`` also stands for slashes.
        **options: Options of the file system, such as credentials. They do not enter the key of a database.

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

    @property
    def files(self) -> list[str]:
        """The paths of the files below the URL, sorted. They are listed at each access."""
        return list(self.stamps())

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """See `DocumentSource.stamps`."""
        self._files.invalidate_cache()
        entries = self._files.find(self._root, detail=True)
        names = {path.removeprefix(self._root).lstrip("/"): entry for path, entry in entries.items()}
        found = {name: _stamp(names[name]) for name in sorted(names) if fnmatch.fnmatchcase(name, self.glob)}
        if not found:
            raise ValueError(f"`url` must have files that match {self.glob!r}, but {self.url} has none. Change `glob`.")
        return found

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
            pieces = filter(None, self._decode(name))
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


def _stamp(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the size of a file, and a hash of what its store says about its version."""
    version = [str(entry.get(key)) for key in _VERSION]
    return int(entry.get("size") or 0), int(hashlib.sha256("\n".join(version).encode()).hexdigest()[:15], 16)


_VERSION = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated", "mtime", "ino", "created")
