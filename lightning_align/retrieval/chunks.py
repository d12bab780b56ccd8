"""Stage 1: cut documents into chunks of tokens, which a `ChunkTable` reads."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lightning_align.retrieval.duplicates import BINS, group_documents, shingles, signature, sketch
from lightning_align.retrieval.parts import Part, WholeText, chunk_bytes, cut, encode_part
from lightning_align.retrieval.sources import DocumentSource as DocumentSource
from lightning_align.retrieval.sources import Survey, check_unchanged, digests_of, is_current, opened, survey
from lightning_align.retrieval.stages import Arrays, Stage, Team, write_bytes, write_rows
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retrieval.token_ids import ChunkTokenizer as ChunkTokenizer
from lightning_align.retrieval.token_ids import token_dtype, tokenizer_key
from lightning_align.types import Document

T = TypeVar("T")
R = TypeVar("R")

FORMAT = 3
"""Version of the file format. Increase it when the same settings lead to other bytes."""
BLOCK_BYTES = 1 << 20
"""Minimum number of characters per block of documents (the last block can be smaller). A killed build loses only
the blocks in progress."""


def build_chunks(
    root: Path,
    source: DocumentSource,
    tokenizer: ChunkTokenizer,
    *,
    chunk_size: int,
    team: Team,
    verify: float,
    byte_counts: bool = True,
    kept: str | None = None,
) -> Stage:
    """Cut documents into chunks, unless the finished stage exists.

    Args:
        root: Folder of the database.
        source: The documents. Empty documents are counted and skipped.
        tokenizer: Converts texts to token ids.
        chunk_size: Tokens per chunk (m).
        team: The ranks that share the work.
        verify: Fraction of the blocks that are computed twice and compared.
        byte_counts: Whether to count the bytes of each chunk. Bits per byte need them, so documents that a model is evaluated
            on have them. Without them the tokenizer does not report token positions, which saves a third of its time.
        kept: Name of a stage's folder. If that is the stage of these documents, it is returned and not built. It was removed
            because a later generation has all that is needed of it.

    Raises:
        ValueError: If no document has text, two documents have the same name, or the disk is full.
    """
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, but got {chunk_size}.")
    with team.together():
        surveyed = survey(source) if team.rank == 0 else Survey("", np.zeros((0, 2), np.uint64))
    inputs = {"format": FORMAT, "documents": team.share(surveyed.key), "tokenizer": tokenizer_key(tokenizer)}
    stage = Stage(root, "chunks", {**inputs, "chunk_size": chunk_size, "byte_counts": byte_counts})
    if stage.folder.name == kept:
        return stage
    with team.together():
        done = team.rank == 0 and stage.is_finished(verify=verify > 0)
    if team.share(done):
        return stage
    counts = {"empty_documents": 0}
    with team.together():
        num_blocks = 0

        def work() -> Iterator[tuple[Callable[[int, Arrays], None], int, list[Document] | Part]]:
            nonlocal num_blocks
            for number, documents in enumerate(_blocks(source, tokenizer, counts)):
                num_blocks = number + 1
                if number % team.size == team.rank:
                    if not is_current(stage, number, documents):
                        yield stage.write_block, number, documents
                    if stage.is_sampled(number, verify):
                        yield stage.check_block, number, documents

        chunked = _map_ahead(lambda task: (task[0], task[1], _chunk(task[2], tokenizer, chunk_size, byte_counts)), work())
        for put, number, arrays in tqdm(
            chunked, desc="chunks", unit=" blocks", disable=None if team.rank == 0 else True, leave=False
        ):
            put(number, arrays)
        if num_blocks == 0:
            raise ValueError(
                f"`source` must have a document with text, but all of its {counts['empty_documents']} documents are empty. "
                "Use another folder or file."
            )
    with team.together():
        if team.rank == 0:
            check_unchanged(stage, surveyed, num_blocks)
            _merge(stage, num_blocks, tokenizer, chunk_size, counts)
    return stage


def check_count(stage: Stage, max_chunks: int) -> None:
    """Check the number of chunks of a finished stage.

    Raises:
        ValueError: If there are more than `max_chunks`.
    """
    table = ChunkTable(stage.folder)
    if len(table) > max_chunks:
        raise ValueError(
            f"The documents must have at most `max_chunks` chunks, {max_chunks:,}, but they have {len(table):,} of"
            f" {table.chunk_size} tokens. Nothing was encoded yet. Leave out documents, or increase `max_chunks` or"
            " `chunk_size`."
        )


def _map_ahead(function: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
    """Map a function over items in order. Two threads compute the next two results ahead.

    Threads help because tokenizers release the GIL and disk writes release the processor.
    """
    with ThreadPoolExecutor(2) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _blocks(source: DocumentSource, tokenizer: ChunkTokenizer, counts: dict[str, int]) -> Iterator[list[Document] | Part]:
    """Yield blocks: several short documents, or a part of a long one."""
    block: list[Document] = []
    size = 0
    for document, rest in opened(source):
        if not document.text:
            counts["empty_documents"] += 1
            continue
        for piece in cut(document, rest, tokenizer.split_point):
            if block and (size >= BLOCK_BYTES or isinstance(piece, Part)):
                yield block
                block, size = [], 0
            if isinstance(piece, Part):
                yield piece
            else:
                block.append(piece)
                size += len(piece.text)
    if block:
        yield block


def _chunk(
    documents: Sequence[Document] | Part, tokenizer: ChunkTokenizer, chunk_size: int, byte_counts: bool
) -> dict[str, NDArray[Any]]:
    dtype = token_dtype(tokenizer.vocab_size)
    if isinstance(documents, Part):
        return encode_part(documents, tokenizer, dtype, byte_counts=byte_counts)
    bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=np.int64)
    tokens: list[NDArray[Any]] = []
    num_bytes: list[int] = []
    signatures: list[NDArray[Any]] = []
    sketches = []
    texts = [document.text for document in documents]
    encoded: Iterable[tuple[NDArray[Any], list[int]]]
    if byte_counts:
        # With a bos token, the second chunk begins with token number chunk_size - 1 of the text.
        encoded = tokenizer.encode(texts, start=chunk_size - len(bos), step=chunk_size)
    else:
        encoded = ((ids, []) for ids in tokenizer.ids(texts))
    for document, (ids, marks) in zip(documents, encoded, strict=True):
        if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
            raise ValueError(
                f"{document.id}: ids must be below `tokenizer.vocab_size` {tokenizer.vocab_size}, but got {ids.max()}."
            )
        tokens.append(np.concatenate([bos, ids, [tokenizer.eos_id]]).astype(dtype))
        hashes = shingles(document.text)
        signatures.append(signature(hashes))
        sketches.append(sketch(hashes))
        if byte_counts:
            num_chunks = -(-len(tokens[-1]) // chunk_size)
            # If the last chunk consists of the end-of-sequence token alone, it begins where the text ends.
            marks = [*[0, *marks, len(document.text)][:num_chunks], len(document.text)]
            num_bytes += _byte_counts(document.text, marks)
    return {
        "tokens": np.concatenate(tokens),
        "lengths": np.array([len(run) for run in tokens], dtype=np.int64),
        "num_bytes": np.array(num_bytes, dtype=np.uint32),
        "signatures": np.stack(signatures),
        "sketches": np.concatenate([each.hashes for each in sketches]),
        "sketch_lengths": np.array([len(each.hashes) for each in sketches], dtype=np.int64),
        "sketch_limits": np.array([each.limit for each in sketches], dtype=np.uint64),
        "digests": digests_of(documents),
        "ids": np.frombuffer(json.dumps([document.id for document in documents]).encode(), dtype=np.uint8),
    }


def _byte_counts(text: str, marks: Sequence[int]) -> list[int]:
    """Count the UTF-8 bytes of the text between consecutive marks."""
    if text.isascii():
        return [stop - start for start, stop in pairwise(marks)]
    return [len(text[start:stop].encode()) for start, stop in pairwise(marks)]


def append_chunks(root: Path, before: Stage, added: Stage, *, deleted: Sequence[int], team: Team) -> Stage:
    """Concatenate the chunks of two stages. Chunks of the first stage keep their numbers.

    Args:
        root: Folder of the database.
        before: The first stage, finished.
        added: The second stage, finished, of the same tokenizer and chunk size.
        deleted: Numbers of deleted documents of the first stage. Their names can be used again.
        team: The ranks. Rank 0 does the work and the others wait.

    Raises:
        ValueError: If both stages have a document of the same name.
    """
    stage = Stage(root, "chunks", {"format": FORMAT, "base": before.key, "added": added.key})
    with team.together():
        if team.rank == 0 and not stage.is_finished():
            first, second = ChunkTable(before.folder), ChunkTable(added.folder)
            dropped, both = set(deleted), first.has_byte_counts and second.has_byte_counts
            names = {name for number, name in enumerate(first.document_ids) if number not in dropped}
            if twice := [name for name in second.document_ids if name in names]:
                raise ValueError(
                    f"Names of added documents must be new, but the database has a document {twice[0]!r} already ({len(twice)} "
                    "such names). Delete it first, or rename the added document."
                )
            content = Content(
                tokens=lambda: iter([first.tokens, second.tokens]),
                num_bytes=(lambda: iter([first.num_bytes, second.num_bytes])) if both else None,
                lengths=np.concatenate([np.diff(first.token_offsets), np.diff(second.token_offsets)]),
                signatures=lambda: iter([first.signatures, second.signatures]),
                sketches=lambda: iter([first.sketches, second.sketches]),
                sketch_lengths=np.concatenate([np.diff(first.sketch_offsets), np.diff(second.sketch_offsets)]),
                sketch_limits=np.concatenate([first.sketch_limits, second.sketch_limits]),
                names=[*first.document_ids, *second.document_ids],
            )
            write_table(stage, content, first.settings, {})
    return stage


class Content(NamedTuple):
    """Content of a chunk table."""

    tokens: Callable[[], Iterator[NDArray[Any]]]
    """Yields all tokens, in parts."""
    num_bytes: Callable[[], Iterator[NDArray[Any]]] | None
    """Yields the byte counts of all chunks, in parts. None if they were not counted."""
    lengths: NDArray[np.int64]
    """(D,) tokens per document."""
    signatures: Callable[[], Iterator[NDArray[np.uint64]]]
    """Yields the signatures (D, BINS) of all documents, in parts."""
    sketches: Callable[[], Iterator[NDArray[Any]]]
    """Yields the shingle hashes of all documents, in parts."""
    sketch_lengths: NDArray[np.int64]
    """(D,) shingle hashes per document."""
    sketch_limits: NDArray[np.uint64]
    """(D,)."""
    names: list[str]
    """(D,)."""


def _merge(stage: Stage, num_blocks: int, tokenizer: ChunkTokenizer, chunk_size: int, counts: dict[str, int]) -> None:
    names: list[str] = []
    lengths: list[NDArray[np.int64]] = []
    sketch_lengths: list[NDArray[np.int64]] = []
    sketch_limits: list[NDArray[np.uint64]] = []
    signatures: dict[int, NDArray[np.uint64]] = {}  # of long documents, by the first block of each
    long: dict[int, int] = {}  # the blocks of each long document: its first block, and how many there are
    first = 0
    for number in range(num_blocks):
        block = stage.read_block(number)
        if "part" not in block:
            names += json.loads(block["ids"].tobytes())
            lengths.append(block["lengths"])
            sketch_lengths.append(block["sketch_lengths"])
            sketch_limits.append(block["sketch_limits"])
            continue
        if block["part"][0]:
            first = number
            names += json.loads(block["ids"].tobytes())
            lengths.append(np.zeros(1, dtype=np.int64))
        long[first] = number - first + 1
        lengths[-1] += len(block["tokens"])
        if block["part"][1]:
            text = WholeText(stage.read_block(part) for part in range(first, number + 1))
            found, signatures[first] = text.sketch(), text.signature()
            sketch_lengths.append(np.array([len(found.hashes)]))
            sketch_limits.append(np.array([found.limit], dtype=np.uint64))
            del text, found  # the sketch of a long document is large

    def parts(name: str, of_long: Callable[[int, Iterator[Arrays]], NDArray[Any]] | None = None) -> Iterator[NDArray[Any]]:
        """Yield an array of each block. With `of_long`, the blocks of a long document give one array together."""
        number = 0
        while number < num_blocks:
            size = long.get(number, 1) if of_long is not None else 1
            if of_long is not None and number in long:
                yield of_long(number, (stage.read_block(part) for part in range(number, number + size)))
            else:
                yield stage.read_block(number)[name]
            number += size

    if len(set(names)) != len(names):
        twice = next(name for name, number in Counter(names).items() if number > 1)
        raise ValueError(
            f"Names of documents must differ, because documents are deleted by name, but two have the name {twice!r}. "
            "Rename one of them."
        )
    content = Content(
        tokens=lambda: parts("tokens"),
        num_bytes=(lambda: parts("num_bytes", lambda _, blocks: chunk_bytes(blocks, chunk_size)))
        if stage.inputs["byte_counts"]
        else None,
        lengths=np.concatenate(lengths),
        signatures=lambda: parts("signatures", lambda number, _: signatures[number][None]),
        sketches=lambda: parts("sketches", lambda _, blocks: WholeText(blocks).sketch().hashes),
        sketch_lengths=np.concatenate(sketch_lengths),
        sketch_limits=np.concatenate(sketch_limits),
        names=names,
    )
    settings = {
        "chunk_size": chunk_size,
        "pad_id": tokenizer.pad_id,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "tokenizer": tokenizer.fingerprint,
    }
    write_table(stage, content, settings, counts)


def write_table(stage: Stage, content: Content, settings: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Write a chunk table, then finish its stage."""
    token_offsets = np.concatenate([[0], np.cumsum(content.lengths)])
    chunk_offsets = np.concatenate([[0], np.cumsum(-(-content.lengths // settings["chunk_size"]))])
    num_tokens, num_chunks = int(token_offsets[-1]), int(chunk_offsets[-1])
    folder = stage.folder
    write_rows(folder / "tokens.npy", content.tokens(), dtype=token_dtype(settings["vocab_size"]), shape=(num_tokens,))
    files = [name for name in FILES if content.num_bytes is not None or name != "num_bytes.npy"]
    if content.num_bytes is not None:
        write_rows(folder / "num_bytes.npy", content.num_bytes(), dtype=np.uint32, shape=(num_chunks,))
    write_bytes(folder / "document_ids.jsonl", "".join(json.dumps(name) + "\n" for name in content.names).encode())
    write_rows(folder / "signatures.npy", content.signatures(), dtype=np.uint64, shape=(len(content.names), BINS))
    sketch_offsets = np.concatenate([[0], np.cumsum(content.sketch_lengths)])
    write_rows(folder / "sketches.npy", content.sketches(), dtype=np.uint64, shape=(int(sketch_offsets[-1]),))
    arrays = {
        "token_offsets": token_offsets,
        "chunk_offsets": chunk_offsets,
        "sketch_offsets": sketch_offsets,
        "sketch_limits": content.sketch_limits,
    }
    for name, values in arrays.items():
        write_rows(folder / f"{name}.npy", [values], dtype=values.dtype, shape=values.shape)
    table = ChunkTable(folder)
    groups = group_documents(table.signatures, table.sketch)
    write_rows(folder / "groups.npy", [groups], dtype=np.int64, shape=groups.shape)
    num_copies = int((groups != np.arange(len(groups))).sum())
    sizes = {"documents": len(content.names), "chunks": num_chunks, "tokens": num_tokens, "near_duplicates": num_copies}
    settings = {**settings, "byte_counts": content.num_bytes is not None}
    stage.finish(table=settings, counts={**counts, **sizes}, files=files)


FILES = (
    "tokens.npy",
    "token_offsets.npy",
    "chunk_offsets.npy",
    "num_bytes.npy",
    "signatures.npy",
    "sketches.npy",
    "sketch_offsets.npy",
    "sketch_limits.npy",
    "groups.npy",
    "document_ids.jsonl",
)
