"""Stage 4: the neighbors of every chunk, and what generation and training share: search that leaves chunks out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own

from lightning_align.retrieval.chunks import document_shingles
from lightning_align.retrieval.duplicates import Pair, find_copies
from lightning_align.retrieval.stages import Stage, Team, write_bytes, write_rows
from lightning_align.retrieval.tables import Bools, ChunkTable, Floats, Ints

FORMAT = 2
"""Raise it when the same settings come to mean other bytes."""
BLOCK_CHUNKS = 8192
"""Chunks of a block: whose neighbors are looked for together, and what a kill costs at most."""
DELETED = -1
"""The group of chunks that nobody may find."""


class Nearest(NamedTuple):
    """The nearest chunks of n queries, nearest first."""

    ids: Ints
    """(n, k); 0 where there is none."""
    mask: Bools
    """(n, k) whether there is one."""
    distances: Floats
    """(n, k); infinite where there is none."""


class Forbidden(NamedTuple):
    """Groups of documents that queries must not find, as pairs of a row and a group."""

    rows: Ints
    groups: Ints


class Searcher(Protocol):
    """What finds chunks of a database."""

    def nearest(self, queries: Any, k: int, forbidden: Forbidden) -> Nearest:
        """The k nearest chunks of each query in documents that it may find.

        Args:
            queries: n of them: what `queries_of` gave for dense search, see the implementations.
            k: how many; where fewer are allowed, the others are masked.
            forbidden: what each must not find.
        """
        ...

    def queries_of(self, table: ChunkTable, chunks: range) -> Any:
        """What to look for some chunks of a table by."""
        ...


def group_of_chunks(table: ChunkTable, deleted: Ints) -> Ints:
    """(C,) the near-duplicate group of each chunk's document; -1 for those of deleted documents."""
    groups = np.array(table.groups)
    groups[deleted] = DELETED
    return np.repeat(groups, np.diff(table.chunk_offsets))


def pick(ids: Ints, distances: Floats, allowed: Bools, k: int) -> Nearest:
    """The first k allowed of (n, found) candidates, which are in order."""
    place = np.argsort(~allowed, axis=1, kind="stable")[:, :k]
    mask: Bools = np.take_along_axis(allowed, place, axis=1)
    near: Ints = np.where(mask, np.take_along_axis(ids, place, axis=1), 0)
    far: Floats = np.where(mask, np.take_along_axis(distances, place, axis=1), np.float32(np.inf))
    missing = ((0, 0), (0, k - place.shape[1]))
    return Nearest(np.pad(near, missing), np.pad(mask, missing), np.pad(far, missing, constant_values=np.inf))


def build_neighbors(
    root: Path,
    queries: Stage,
    database: Stage,
    searcher: Searcher,
    *,
    inputs: Mapping[str, Any],
    deleted: Ints,
    k: int,
    team: Team,
    verify: float,
    hide_copies: bool | None = None,
) -> Stage:
    """Find the neighbors of every chunk of a table, unless that is done already.

    A document never finds itself nor a near-duplicate of itself, so the continuation of a neighbor, which ends with the
    neighbor's document, is never a copy of what follows the chunk there.

    Args:
        root: folder of the database.
        queries: the chunks that neighbors are wanted of, a finished stage.
        database: the chunks that can be neighbors, a finished stage.
        searcher: finds them.
        inputs: what its answers depend on besides.
        deleted: numbers of documents of the database that nobody may find.
        k: neighbors of each chunk.
        team: the ranks that share the work.
        verify: share of the blocks that are made twice and compared.
        hide_copies: None if the queries are the database's own documents; else whether these, which should not be there, may
            not find near-duplicates of themselves in it either.

    Raises:
        ValueError: if k is out of range, or the disk is full.
    """
    same = hide_copies is None
    settings = {"queries": queries.key, "database": database.key, "deleted": deleted.tolist(), "k": k, **inputs}
    if not same:
        settings["hide_copies"] = hide_copies
    stage = Stage(root, "neighbors", {"format": FORMAT, **settings})
    with team.together():
        done = team.rank == 0 and stage.is_finished(verify=verify > 0)
    if team.tell(done):
        return stage
    own, other = ChunkTable(queries.folder), ChunkTable(database.folder)
    if not 1 <= k < max(2, len(other)):
        raise ValueError(
            f"k is {k}, and the database has {len(other)} chunks: expected 1 to {max(1, len(other) - 1)}; add documents, or "
            "make the chunks smaller"
        )
    with team.together():
        copies = [] if same else find_leaks(own, other)
        by_document = _forbidden_documents(own, other, copies if hide_copies else [], same=same)
    num_blocks = -(-len(own) // BLOCK_CHUNKS)

    def make(number: int) -> dict[str, NDArray[Any]]:
        chunks = range(number * BLOCK_CHUNKS, min((number + 1) * BLOCK_CHUNKS, len(own)))
        forbidden = _spread(by_document, own.document_of(np.arange(chunks.start, chunks.stop)))
        return searcher.nearest(searcher.queries_of(own, chunks), k, forbidden)._asdict()

    with team.together():
        mine = range(team.rank, num_blocks, team.size)
        for number in tqdm(mine, desc="neighbors", unit=" blocks", disable=None if team.rank == 0 else True, leave=False):
            if not stage.has_block(number):
                stage.write_block(number, make(number))
            if stage.is_sampled(number, verify):
                stage.check_block(number, make(number))
    with team.together():
        if team.rank == 0:
            num_missing = 0
            for name, dtype in (("ids", np.int64), ("mask", np.bool_), ("distances", np.float32)):
                parts = (stage.read_block(number)[name] for number in range(num_blocks))
                write_rows(stage.folder / f"{name}.npy", parts, dtype=dtype, shape=(len(own), k))
            for number in range(num_blocks):
                num_missing += int((~stage.read_block(number)["mask"]).sum())
            leaks = [
                {
                    "document": own.document_ids[pair.first],
                    "found": other.document_ids[pair.second],
                    "similarity": pair.similarity,
                }
                for pair in copies
            ]
            write_bytes(stage.folder / "leaks.json", json.dumps(leaks, indent=2).encode())
            stage.finish(
                table={"k": k},
                counts={"chunks": len(own), "missing_neighbors": num_missing, "leaks": len(leaks)},
                files=["ids.npy", "mask.npy", "distances.npy", "leaks.json"],
            )
    return stage


def find_leaks(queries: ChunkTable, database: ChunkTable) -> list[Pair]:
    """Documents of which a database has a near-duplicate, the most similar first.

    Args:
        queries: the documents that should not be there.
        database: where they are looked for.
    """
    return find_copies(
        np.asarray(queries.signatures),
        lambda document: document_shingles(queries, document, has_bos=queries.has_bos),
        np.asarray(database.signatures),
        lambda document: document_shingles(database, document, has_bos=database.has_bos),
        database.groups,
    )


def _forbidden_documents(queries: ChunkTable, database: ChunkTable, copies: list[Pair], *, same: bool) -> Forbidden:
    """What each document of the queries must not find."""
    if same:
        return Forbidden(np.arange(queries.num_documents), np.array(database.groups))
    rows = np.array([pair.first for pair in copies], dtype=np.int64)
    return Forbidden(rows, database.groups[np.array([pair.second for pair in copies], dtype=np.int64)])


def _spread(forbidden: Forbidden, documents: Ints) -> Forbidden:
    """What is forbidden to documents, as what is forbidden to the rows that belong to them."""
    order = np.argsort(forbidden.rows, kind="stable")
    rows, groups = forbidden.rows[order], forbidden.groups[order]
    first, last = np.searchsorted(rows, documents, side="left"), np.searchsorted(rows, documents, side="right")
    counts = last - first
    spread = np.repeat(np.arange(len(documents)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Forbidden(spread, groups[np.repeat(first, counts) + offsets])
