"""The finished tables of a retrieval database: chunks of tokens, and the neighbors of each chunk. Memory-mapped, picklable.

Legend: ``m`` tokens per chunk, ``C`` chunks, ``D`` documents, ``k`` neighbors per chunk.

A document is a sequence of tokens: the beginning-of-sequence token if the tokenizer has one, the text, and the end-of-sequence
token. It is cut into chunks of m tokens. Its last chunk can be shorter. Chunks are numbered across all documents in order, so
the chunks of a document are a range. A chunk and its continuation are consecutive tokens, which end with the document.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_align.retrieval.duplicates import Sketch
from lightning_align.retrieval.sealed import value_of
from lightning_align.retrieval.stages import MANIFEST, read_manifest

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


class Tokens(NamedTuple):
    """Sequences of tokens of one width, padded on the right."""

    ids: Ints
    """(..., width) token ids, and the padding id at padding."""
    mask: Bools
    """(..., width) true at tokens, false at padding."""


class _Folder:
    """Arrays of a folder. Each process maps an array at first access. Only the path is pickled."""

    arrays: ClassVar[tuple[str, ...]] = ()
    """The arrays that a reader needs."""
    expected: ClassVar[Mapping[str, type | tuple[type, ...]]] = {}
    """The settings that the stage has, with their types."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a mapped array would copy all of it.
        return {"folder": self.folder}

    def hold(self) -> Self:
        """Map all arrays now, so that they stay readable in this process when a compaction removes the folder."""
        for name in ("settings", *self.arrays):
            getattr(self, name)
        return self

    def _map(self, name: str) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            return array
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(f"{name}.npy", error) from error

    def _damaged(self, name: str, error: Exception) -> ValueError:
        if not self.folder.is_dir():
            return ValueError(
                f"{self.folder} is missing. If the database was compacted after it was opened, open it again. Otherwise build "
                "it again."
            )
        return ValueError(
            f"{self.folder / name} is missing or damaged ({error}). Build the database again. Only damaged stages are "
            "made again."
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that the stage wrote for its readers."""
        try:
            settings: dict[str, Any] = read_manifest(self.folder)["table"]
            for name, kind in self.expected.items():
                if isinstance(value := value_of(settings, name, kind), int) and value < (name in ("chunk_size", "vocab_size")):
                    raise ValueError(f"its {name!r} cannot be {value}")
        except (OSError, ValueError) as error:
            raise self._damaged(MANIFEST, error) from error
        return settings


class ChunkTable(_Folder):
    """Chunks of documents, by number. A file is opened at first access, once per process.

    Args:
        folder: Folder of a finished chunk stage.
    """

    arrays = ("tokens", "token_offsets", "chunk_offsets", "groups")
    expected = MappingProxyType(
        {
            "chunk_size": int,
            "pad_id": int,
            "vocab_size": int,
            "tokenizer": str,
            "bos_id": (int, type(None)),
            "byte_counts": bool,
        }
    )

    def hold(self) -> Self:
        """See the base class."""
        super().hold()
        if self.has_byte_counts:
            self.num_bytes  # noqa: B018  # maps it
        return self

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk (m)."""
        return int(self.settings["chunk_size"])

    @property
    def pad_id(self) -> int:
        """The id of padding. It can equal the id of a token, so use the mask to tell them apart."""
        return int(self.settings["pad_id"])

    @property
    def vocab_size(self) -> int:
        """The number of ids that the tokenizer has, which is one more than the largest id."""
        return int(self.settings["vocab_size"])

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer of the ids. Compare it before you pass the ids to a model."""
        return str(self.settings["tokenizer"])

    @property
    def has_bos(self) -> bool:
        """Whether documents begin with a beginning-of-sequence token."""
        return self.settings["bos_id"] is not None

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All tokens of all documents, concatenated. The type is uint16 if the vocabulary fits, else int32."""
        return self._map("tokens")

    @cached_property
    def token_offsets(self) -> Ints:
        """(D + 1,) position of each document's first token, then the number of all tokens."""
        return self._map("token_offsets")

    @cached_property
    def chunk_offsets(self) -> Ints:
        """(D + 1,) number of each document's first chunk, then the number of all chunks."""
        return self._map("chunk_offsets")

    @property
    def has_byte_counts(self) -> bool:
        """Whether there are `num_bytes`. Query sets have them for evaluation. Chunks that can be neighbors do not."""
        return bool(self.settings["byte_counts"])

    @cached_property
    def num_bytes(self) -> NDArray[np.uint32]:
        """(C,) UTF-8 bytes of the text of each chunk. They sum to the size of the document. See `has_byte_counts`."""
        return self._map("num_bytes")

    @cached_property
    def groups(self) -> Ints:
        """(D,) near-duplicate group of each document: the number of the first document of the group."""
        return self._map("groups")

    @cached_property
    def signatures(self) -> NDArray[np.uint64]:
        """(D, bins) MinHash signature of each document, to find near-duplicates by."""
        return self._map("signatures")

    @cached_property
    def sketches(self) -> NDArray[np.uint64]:
        """The shingle hashes of all documents, concatenated. See `sketch`."""
        return self._map("sketches")

    @cached_property
    def sketch_offsets(self) -> Ints:
        """(D + 1,) position of each document's first shingle hash, then the number of all."""
        return self._map("sketch_offsets")

    @cached_property
    def sketch_limits(self) -> NDArray[np.uint64]:
        """(D,) up to which number the sketch of a document has all its hashes."""
        return self._map("sketch_limits")

    def sketch(self, document: int) -> Sketch:
        """Return the sketch of the text of a document, given by its number."""
        start, stop = self.sketch_offsets[document : document + 2]
        return Sketch(np.asarray(self.sketches[start:stop]), self.sketch_limits[document])

    @cached_property
    def document_ids(self) -> list[str]:
        """(D,) name of each document."""
        name = "document_ids.jsonl"
        try:
            with (self.folder / name).open(encoding="utf-8") as lines:
                ids = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(name, error) from error
        if len(ids) != self.num_documents or not all(isinstance(each, str) for each in ids):
            raise self._damaged(name, ValueError(f"it must have {self.num_documents} lines, each a text"))
        return ids

    def __len__(self) -> int:
        return int(self.chunk_offsets[-1])

    @property
    def num_documents(self) -> int:
        """The number of documents, including documents that were deleted in a later generation of the database."""
        return len(self.token_offsets) - 1

    def chunks_of(self, document: int) -> range:
        """Return the chunk numbers of a document, given by its number."""
        return range(int(self.chunk_offsets[document]), int(self.chunk_offsets[document + 1]))

    def document_of(self, chunks: ArrayLike) -> Ints:
        """Return the numbers (...) of the documents that contain the chunks (...)."""
        after = np.searchsorted(self.chunk_offsets, np.asarray(chunks), side="right")
        document: Ints = np.asarray(after) - 1
        return document

    def lengths(self, chunks: ArrayLike) -> Ints:
        """Return the number of tokens (...) of each chunk: m, or fewer at the end of a document."""
        start, end = self._spans(np.asarray(chunks))
        lengths: Ints = np.minimum(end - start, self.chunk_size)
        return lengths

    def chunk(self, number: int) -> Ints:
        """Return the tokens of a chunk, at most m, unpadded."""
        start, end = self._spans(np.asarray(number))
        return np.asarray(self.tokens[start : min(int(end), int(start) + self.chunk_size)], dtype=np.int64)

    def continuation(self, number: int) -> Tokens:
        """Return the m tokens after a chunk. They are all padding if the document ends with the chunk."""
        both = self.gather(number, 2 * self.chunk_size)
        return Tokens(both.ids[self.chunk_size :], both.mask[self.chunk_size :])

    def gather(self, chunks: ArrayLike, num_tokens: int | None = None) -> Tokens:
        """Return the tokens from the beginning of each chunk on. A sequence stops at the end of its document.

        Args:
            chunks: (...) chunk numbers.
            num_tokens: Width of each sequence. Default is m, the chunk itself. 2m is the chunk with its continuation, which is
                a neighbor in RETRO. n * m + 1 is a training sequence of n chunks with the target of its last token.

        Returns:
            (..., num_tokens).

        Raises:
            IndexError: If a chunk number is out of range.
        """
        width = self.chunk_size if num_tokens is None else num_tokens
        start, end = self._spans(np.asarray(chunks))
        places = start[..., None] + np.arange(width)
        mask = places < end[..., None]
        ids = self.tokens[np.minimum(places, end[..., None] - 1)].astype(np.int64)
        ids[~mask] = self.pad_id
        return Tokens(ids, mask)

    def _spans(self, chunks: Ints) -> tuple[Ints, Ints]:
        """Return the first token (...) of each chunk and the end (...) of its document."""
        if chunks.size and not 0 <= chunks.min() <= chunks.max() < len(self):
            raise IndexError(
                f"`chunks` must be chunk numbers from 0 to {len(self) - 1}, but got {chunks.min()} to {chunks.max()}. "
                "Use numbers of this table."
            )
        document = self.document_of(chunks)
        start = self.token_offsets[document] + (chunks - self.chunk_offsets[document]) * self.chunk_size
        return start, self.token_offsets[document + 1]


class Neighbors(_Folder):
    """The nearest chunks of a database for each chunk of a table, nearest first. Row i belongs to chunk i of the table.

    Args:
        folder: Folder of a finished neighbor stage.
    """

    arrays = ("ids", "mask", "distances")

    @cached_property
    def ids(self) -> Ints:
        """(C, k) chunk numbers of the database, 0 where the mask is false."""
        return self._map("ids")

    @cached_property
    def mask(self) -> Bools:
        """(C, k) true where there is a neighbor. In each row, true entries come before false entries."""
        return self._map("mask")

    @cached_property
    def distances(self) -> Floats:
        """(C, k) squared Euclidean distances of the vectors, or negated BM25 scores. Infinite where there is no neighbor."""
        return self._map("distances")

    @property
    def k(self) -> int:
        """The number of neighbors per chunk. To use fewer, take the first columns."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)
