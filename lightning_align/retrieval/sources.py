"""Reading a source of documents twice: once for the key of the chunks, once to cut them, with the two compared.

The key of a database is made of the names and texts that a reading yields, not of what a source says about itself. A source
that was changed cannot be mistaken for what it was, whether or not it is another object, and a document that changes between
the two readings is found by its hash and named.
"""

import hashlib
import json
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.access import LOCK
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.types import Document

Digests = NDArray[np.uint64]


class DocumentSource(Protocol):
    """Source of documents. It may have methods ``stamps()``, see `changed_files`, and ``open_texts()``, see `opened`."""

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Every call yields the same documents in the same order, as long as nothing changes them."""
        ...


class Piece(Protocol):
    """A part of a long document."""

    @property
    def id(self) -> str:
        """The name of the document."""
        ...

    @property
    def text(self) -> str:
        """The text of the part."""
        ...

    @property
    def is_first(self) -> bool:
        """Whether the document begins with it."""
        ...

    @property
    def is_last(self) -> bool:
        """Whether the document ends with it."""
        ...

    @property
    def digest(self) -> bytes:
        """The hash of the whole document, at its last part."""
        ...


class Survey(NamedTuple):
    """What a first reading of a source found."""

    key: str
    """A hash of the names and texts of all documents, in order."""
    digests: Digests
    """(D, 2) a hash of each document that has text."""


def survey(source: DocumentSource) -> Survey:
    """Read all documents of a source, and hash them. 16 bytes per document stay in memory."""
    digests, whole = array("Q"), hashlib.sha256()
    for document, rest in opened(source):
        if document.text:
            content = Digest(document.id)
            content.update(document.text)
            for text in rest:
                content.update(text)
            digests.frombytes(content.digest())
            whole.update(content.all())
    return Survey(whole.hexdigest(), np.array(digests, dtype=np.uint64).reshape(-1, 2))


def opened(source: DocumentSource) -> Iterator[tuple[Document, Iterable[str]]]:
    """Yield each document, or the beginning of a long one with what follows it."""
    read: Any = getattr(source, "open_texts", None)
    return ((document, ()) for document in source.documents()) if read is None else read()


class Digest:
    """The hash of a document that is given in pieces.

    Args:
        name: The name of the document.
    """

    def __init__(self, name: str) -> None:
        # A name of a file can have bytes that are not UTF-8, and a text half a character. Both must have a hash.
        content = name.encode("utf-8", errors="surrogatepass")
        self._hash = hashlib.sha256(b"%d:%b" % (len(content), content))

    def update(self, text: str) -> None:
        """Add the next piece of the text."""
        self._hash.update(text.encode("utf-8", errors="surrogatepass"))

    def all(self) -> bytes:
        """Return the hash, 32 bytes."""
        return self._hash.digest()

    def digest(self) -> bytes:
        """Return the 16 bytes that are kept."""
        return self.all()[:16]


def content_of(part: Piece) -> Digests:
    """Hash a part of a long document (2,), its place included."""
    content = Digest(f"{part.id}\0{part.is_first}{part.is_last}{part.digest.hex()}")
    content.update(part.text)
    return np.frombuffer(content.digest(), dtype=np.uint64)


def digests_of(documents: Sequence[Document]) -> Digests:
    """Hash each document (D, 2), as `survey` does."""
    return np.frombuffer(b"".join(_digest(document) for document in documents), dtype=np.uint64).reshape(-1, 2)


def is_current(stage: Stage, number: int, documents: list[Document] | Piece) -> bool:
    """Whether a block exists and is of these documents. A block of others, which a source had for a while, is deleted."""
    if not stage.has_block(number):
        return False
    block = stage.read_block(number)
    name, expected = ("digests", digests_of(documents)) if isinstance(documents, list) else ("content", content_of(documents))
    if ("content" in block) == (name == "content") and np.array_equal(block[name], expected):
        return True
    stage.drop_block(number)
    return False


def check_unchanged(stage: Stage, surveyed: Survey, num_blocks: int) -> None:
    """Compare the documents that were cut with those that the key of the stage was made of.

    Args:
        stage: The stage of the chunks, whose blocks have the digests of their documents.
        surveyed: The first reading.
        num_blocks: The number of blocks of the second reading. Other blocks are deleted.

    Raises:
        ValueError: If a document was changed between the two readings.
    """
    extra = num_blocks
    while stage.has_block(extra):
        stage.drop_block(extra)
        extra += 1
    start, names = 0, [""]
    for number in range(num_blocks):
        block = stage.read_block(number)
        read, names = block["digests"], json.loads(block["ids"].tobytes())
        expected = surveyed.digests[start : start + len(read)]
        differ = np.flatnonzero((expected != read[: len(expected)]).any(axis=1))
        if len(differ) or len(expected) < len(read):
            raise _changed(f"{names[differ[0] if len(differ) else len(expected)]!r}")
        start += len(read)
    if start < len(surveyed.digests):
        raise _changed(f"after {names[-1]!r}")


def _changed(which: str) -> ValueError:
    return ValueError(
        f"The document {which} was changed, added or removed while the database was built: the second reading of the documents"
        " differs from the first. Build again when nothing changes them. Blocks of documents that are the same are kept."
    )


def stamps(source: DocumentSource) -> Mapping[str, tuple[int, ...]]:
    """Return the stamps of the files of a source, by name. Empty if the source has none."""
    found: Mapping[str, tuple[int, ...]] = getattr(source, "stamps", dict)()
    return found


def stamps_apart(sources: Mapping[str, DocumentSource], root: Path) -> dict[str, Mapping[str, tuple[int, ...]]]:
    """Return the `stamps` of sources, by name. Call it with the lock of the database.

    Args:
        sources: The sources.
        root: Folder of the database that is built from them.

    Raises:
        ValueError: If a source lists files of the database, because that lies in the folder of its documents.
    """
    found = {name: stamps(source) for name, source in sources.items()}
    if any(name.rpartition("/")[2] == LOCK for names in found.values() for name in names):
        raise ValueError(
            f"The documents must not be files of the database, but they list {LOCK} of {root}. Build the database in a folder"
            " of its own, or choose the documents with `glob`, such as '**/*.txt'."
        )
    return found


def changed_files(before: Mapping[str, tuple[int, ...]], source: DocumentSource) -> list[str]:
    """List the files that were changed, added or removed since their stamps were taken.

    Args:
        before: The `stamps` of the source at an earlier time.
        source: The source.
    """
    try:
        now = stamps(source)
    except ValueError:  # nothing is left of it
        now = {}
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _digest(document: Document) -> bytes:
    content = Digest(document.id)
    content.update(document.text)
    return content.digest()


def warn_of_changes(before: Mapping[str, tuple[int, ...]], source: DocumentSource, root: Path, team: Team) -> None:
    """Warn if files of a source changed during a build.

    Args:
        before: What `stamps` returned before it.
        source: The source.
        root: Folder of the database.
        team: The ranks. Rank 0 warns.
    """
    if team.rank == 0 and (names := changed_files(before, source)):
        warnings.warn(
            f"{len(names)} files were changed, added or removed while {root} was built, such as {names[0]}. The"
            " database has their text as it was when it was read. Build again to take in the changes.",
            stacklevel=3,
        )
