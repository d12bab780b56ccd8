"""The interface of a source of documents."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from lightning_align.types import Document

PIECE = 1 << 22
"""The number of bytes of a file that are read at a time. A larger file is a long document, see `DocumentSource.open_texts`."""


class DocumentSource(ABC):
    """A source of documents."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that the documents depend on."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield the documents. Every call yields the same documents in the same order."""

    def open_texts(self) -> Iterator[tuple[Document, Iterable[str]]]:
        """Yield each document, or the beginning of a long one with what follows it, which need not fit into memory."""
        return ((document, ()) for document in self.documents())
