"""The finished tables of a retrieval database: chunks of tokens, and the neighbors of each; memory-mapped, picklable.

Legend: ``m`` tokens a chunk, ``C`` chunks, ``D`` documents, ``k`` neighbors of a chunk.

A document is a run of tokens: its beginning-of-sequence token where the tokenizer has one, its text, and the end-of-sequence
token. It is cut into chunks of m tokens from its first token on; its last chunk may be shorter. Chunks are numbered through
all documents in order, so a document's chunks are a range, and a chunk with what follows it is one run of tokens, which
ends with the document.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


class Tokens(NamedTuple):
    """Runs of tokens of one width, padded on the right."""

    ids: Ints
    """(..., width) token ids; the padding id where there is none."""
    mask: Bools
    """(..., width) true at real tokens."""


class _Folder:
    """Arrays of a folder, mapped by each process when it first asks for one: what is pickled is the path alone."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __getstate__(self) -> dict[str, Any]:
        # Sending a mapped array to a worker would copy all of it.
        return {"folder": self.folder}

    def _map(self, name: str) -> Any:
        try:
            return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{self.folder / name}.npy is missing or damaged ({error}): delete {self.folder} and build it again"
            ) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the stage wrote for its readers."""
        path = self.folder / "manifest.json"
        try:
            settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["table"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}): the stage did not come to its end; run it again"
            ) from error
        return settings


class ChunkTable(_Folder):
    """Chunks of documents, by number. Opens nothing until it is asked, and then once in each process.

    Args:
        folder: of a finished chunk stage.
    """

    @property
    def chunk_size(self) -> int:
        """Tokens a chunk (m)."""
        return int(self.settings["chunk_size"])

    @property
    def pad_id(self) -> int:
        """The id that fills short chunks up. It may equal a real one: go by the mask."""
        return int(self.settings["pad_id"])

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer can give."""
        return int(self.settings["vocab_size"])

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer that made the ids; compare before feeding them to a model."""
        return str(self.settings["tokenizer"])

    @property
    def has_bos(self) -> bool:
        """Whether documents begin with a beginning-of-sequence token."""
        return self.settings["bos_id"] is not None

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All tokens of all documents, one after the other; uint16 where the vocabulary fits, else int32."""
        return self._map("tokens")  # type: ignore[no-any-return]

    @cached_property
    def token_offsets(self) -> Ints:
        """(D + 1,) where each document's tokens begin, and the end of the last."""
        return self._map("token_offsets")  # type: ignore[no-any-return]

    @cached_property
    def chunk_offsets(self) -> Ints:
        """(D + 1,) each document's first chunk, and the number of all chunks."""
        return self._map("chunk_offsets")  # type: ignore[no-any-return]

    @property
    def has_byte_counts(self) -> bool:
        """Whether there are `num_bytes`: in query sets, which models are evaluated on, but not in what they retrieve from."""
        return bool(self.settings["byte_counts"])

    @cached_property
    def num_bytes(self) -> NDArray[np.uint32]:
        """(C,) UTF-8 bytes of the text of each chunk; over a document they add up to its size. See `has_byte_counts`."""
        return self._map("num_bytes")  # type: ignore[no-any-return]

    @cached_property
    def groups(self) -> Ints:
        """(D,) documents that are near-duplicates of each other share a number: that of the first of them."""
        return self._map("groups")  # type: ignore[no-any-return]

    @cached_property
    def signatures(self) -> NDArray[np.uint64]:
        """(D, bins) what near-duplicates of each document are found by."""
        return self._map("signatures")  # type: ignore[no-any-return]

    @cached_property
    def document_ids(self) -> list[str]:
        """(D,) the names that the documents came with."""
        with (self.folder / "document_ids.jsonl").open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return int(self.chunk_offsets[-1])

    @property
    def num_documents(self) -> int:
        """Documents, also those that were deleted from a later generation of the database."""
        return len(self.token_offsets) - 1

    def chunks_of(self, document: int) -> range:
        """The chunks of a document, by its number."""
        return range(int(self.chunk_offsets[document]), int(self.chunk_offsets[document + 1]))

    def document_of(self, chunks: ArrayLike) -> Ints:
        """(...) numbers of the documents that chunks (...) belong to."""
        after = np.searchsorted(self.chunk_offsets, np.asarray(chunks), side="right")
        document: Ints = np.asarray(after) - 1
        return document

    def lengths(self, chunks: ArrayLike) -> Ints:
        """(...) tokens of each chunk: m, or fewer at the end of a document."""
        start, end = self._spans(np.asarray(chunks))
        lengths: Ints = np.minimum(end - start, self.chunk_size)
        return lengths

    def chunk(self, number: int) -> Ints:
        """The tokens of a chunk, at most m, unpadded."""
        start, end = self._spans(np.asarray(number))
        return np.asarray(self.tokens[start : min(int(end), int(start) + self.chunk_size)], dtype=np.int64)

    def continuation(self, number: int) -> Tokens:
        """The m tokens behind a chunk: all padding where its document ends with the chunk."""
        both = self.gather(number, 2 * self.chunk_size)
        return Tokens(both.ids[self.chunk_size :], both.mask[self.chunk_size :])

    def gather(self, chunks: ArrayLike, num_tokens: int | None = None) -> Tokens:
        """Runs of tokens from the beginning of chunks on, never across the end of their documents.

        Args:
            chunks: (...) chunk numbers.
            num_tokens: width of each run: by default m, the chunk itself; 2m is the chunk with its continuation, as RETRO
                takes a neighbor; n * m + 1 is a training sequence of n chunks with the target of its last token.

        Returns:
            (..., num_tokens).

        Raises:
            IndexError: if a number is not that of a chunk.
        """
        width = self.chunk_size if num_tokens is None else num_tokens
        start, end = self._spans(np.asarray(chunks))
        places = start[..., None] + np.arange(width)
        mask = places < end[..., None]
        ids = self.tokens[np.minimum(places, end[..., None] - 1)].astype(np.int64)
        ids[~mask] = self.pad_id
        return Tokens(ids, mask)

    def _spans(self, chunks: Ints) -> tuple[Ints, Ints]:
        """(...) first token of each chunk and the end of its document."""
        if chunks.size and not 0 <= chunks.min() <= chunks.max() < len(self):
            raise IndexError(f"chunk numbers reach from {chunks.min()} to {chunks.max()}, there are {len(self)} chunks")
        document = self.document_of(chunks)
        start = self.token_offsets[document] + (chunks - self.chunk_offsets[document]) * self.chunk_size
        return start, self.token_offsets[document + 1]


class Neighbors(_Folder):
    """The nearest chunks of a database for each chunk of a table, nearest first: row i belongs to chunk i of that table.

    Args:
        folder: of a finished neighbor stage.
    """

    @cached_property
    def ids(self) -> Ints:
        """(C, k) chunk numbers of the database; 0 where the mask is false."""
        return self._map("ids")  # type: ignore[no-any-return]

    @cached_property
    def mask(self) -> Bools:
        """(C, k) whether there is such a neighbor; the false ones stand behind the true ones."""
        return self._map("mask")  # type: ignore[no-any-return]

    @cached_property
    def distances(self) -> Floats:
        """(C, k) squared Euclidean distances of unit vectors, or negated scores of BM25; infinite where there is none."""
        return self._map("distances")  # type: ignore[no-any-return]

    @property
    def k(self) -> int:
        """Neighbors kept for each chunk; use fewer by taking the first columns."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)
