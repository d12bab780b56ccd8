"""The interface of a source of documents."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping

from lightning_align.types import Document

PIECE = 1 << 22
"""The number of bytes of a remote file that are read at a time."""


class DocumentSource(ABC):
    """A source of documents.

    A database is keyed by the documents themselves: their names and texts are hashed as they are read.
    """

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield the documents. Every call yields the same documents in the same order, as long as nothing changes them."""

    def open_texts(self) -> Iterator[tuple[Document, Iterable[str]]]:
        """Yield each document, or the beginning of a long one with what follows it, which need not fit into memory.

        What follows is read once, before the next document. Only a document without text may begin with an empty text.
        """
        return ((document, ()) for document in self.documents())

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """Return size and time of the last change of each file, by name. They show whether a file changes during a build."""
        return {}
