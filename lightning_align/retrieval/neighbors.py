"""Stage 4: the neighbors of every chunk. It also defines the search with forbidden documents that live retrieval uses too."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lightning_align.retrieval.leaks import Pair, find_leaks
from lightning_align.retrieval.stages import Stage, Team, write_bytes, write_rows
from lightning_align.retrieval.tables import Bools, ChunkTable, Floats, Ints, Neighbors

FORMAT = 3
"""Version of the file format. Increase it when the same settings lead to other bytes."""
BLOCK_CHUNKS = 8192
"""Chunks per block. A block is searched for at once. A killed build loses only the blocks in progress."""
ALONE = 0.5
"""The fraction of chunks without neighbors above which a build warns."""
DELETED = -1
"""Group number of the chunks of deleted documents, which no search may return."""


class Nearest(NamedTuple):
    """The nearest chunks of n queries, nearest first."""

    ids: Ints
    """(n, k) chunk numbers, 0 where there is no neighbor."""
    mask: Bools
    """(n, k) true where there is a neighbor."""
    distances: Floats
    """(n, k) distances, infinite where there is no neighbor."""


class Forbidden(NamedTuple):
    """Groups of documents that queries must not find, as pairs of a query and a group."""

    rows: Ints
    """(pairs,) number of the query."""
    groups: Ints
    """(pairs,) group that the query must not find."""


class Searcher(Protocol):
    """Finds chunks of a database."""

    def nearest(self, queries: Any, k: int, forbidden: Forbidden) -> Nearest:
        """Find the k nearest chunks of each query in documents that it may find.

        Args:
            queries: n queries in the format of the implementation, which `queries_of` returns.
            k: The number of neighbors per query. If fewer are allowed, the remaining slots are masked.
            forbidden: The groups that each query must not find.
        """
        ...

    def queries_of(self, table: ChunkTable, chunks: range) -> Any:
        """Convert chunks of a table to queries of this searcher."""
        ...


def group_of_chunks(table: ChunkTable, deleted: Ints) -> Ints:
    """Return the near-duplicate group (C,) of each chunk's document, and -1 for chunks of deleted documents.

    Args:
        table: The chunks.
        deleted: Numbers of the deleted documents.
    """
    groups = np.array(table.groups)
    groups[deleted] = DELETED
    return np.repeat(groups, np.diff(table.chunk_offsets))


def pick(ids: Ints, distances: Floats, allowed: Bools, k: int) -> Nearest:
    """Return the first k allowed candidates of each row. Candidates (n, found) are sorted, nearest first."""
    place = np.argsort(~allowed, axis=1, kind="stable")[:, :k]
    mask: Bools = np.take_along_axis(allowed, place, axis=1)
    near: Ints = np.where(mask, np.take_along_axis(ids, place, axis=1), 0)
    far: Floats = np.where(mask, np.take_along_axis(distances, place, axis=1), np.float32(np.inf))
    missing = ((0, 0), (0, k - place.shape[1]))
    return Nearest(np.pad(near, missing), np.pad(mask, missing), np.pad(far, missing, constant_values=np.inf))


def check_k(k: int, table: ChunkTable) -> None:
    """Raise a ValueError if chunks cannot have `k` neighbors, because the database has too few chunks."""
    if not 1 <= k < max(2, len(table)):
        raise ValueError(
            f"`k` must be from 1 to {max(1, len(table) - 1)}, because the database has {len(table)} chunks, but got {k}. "
            "Use another `k`, add documents, or make the chunks smaller."
        )


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
    """Find the neighbors of every chunk of a table, unless the finished stage exists.

    A document never finds itself or a near-duplicate of itself. The continuation of a neighbor ends with the neighbor's
    document, so it is never a copy of the text that follows the chunk.

    Args:
        root: Folder of the database.
        queries: The finished chunk stage to find neighbors for.
        database: The finished stage of the chunks that can be neighbors.
        searcher: Finds the neighbors.
        inputs: Further inputs that the results of the searcher depend on. They enter the key of the stage.
        deleted: Numbers of the deleted documents of the database.
        k: The number of neighbors per chunk.
        team: The ranks that share the work.
        verify: Fraction of the blocks that are computed twice and compared.
        hide_copies: None if the queries are the database's own documents. Otherwise the queries are held-out documents, and
            this is whether their near-duplicates in the database are hidden from them.

    Raises:
        ValueError: If `k` is out of range, or the disk is full.
    """
    same = hide_copies is None
    settings = {"queries": queries.key, "database": database.key, "deleted": deleted.tolist(), "k": k, **inputs}
    if not same:
        settings["hide_copies"] = hide_copies
    stage = Stage(root, "neighbors", {"format": FORMAT, **settings})
    with team.together():
        done = team.rank == 0 and stage.is_finished(verify=verify > 0)
    if team.share(done):
        return stage
    own, other = ChunkTable(queries.folder), ChunkTable(database.folder)
    check_k(k, other)
    with team.together():
        copies = [] if same else find_leaks(own, other)
        by_document = _forbidden_documents(own, other, copies if hide_copies else [], same=same)
    num_blocks = -(-len(own) // BLOCK_CHUNKS)

    def make(number: int) -> dict[str, NDArray[Any]]:
        chunks = range(number * BLOCK_CHUNKS, min((number + 1) * BLOCK_CHUNKS, len(own)))
        forbidden = _expand_to_rows(by_document, own.document_of(np.arange(chunks.start, chunks.stop)))
        return searcher.nearest(searcher.queries_of(own, chunks), k, forbidden)._asdict()

    with team.together():
        own_blocks = range(team.rank, num_blocks, team.size)
        for number in tqdm(own_blocks, desc="neighbors", unit=" blocks", disable=None if team.rank == 0 else True, leave=False):
            if not stage.has_block(number):
                stage.write_block(number, make(number))
            if stage.is_sampled(number, verify):
                stage.check_block(number, make(number))
    with team.together():
        if team.rank == 0:
            num_missing = num_alone = 0
            for name, dtype in (("ids", np.int64), ("mask", np.bool_), ("distances", np.float32)):
                parts = (stage.read_block(number)[name] for number in range(num_blocks))
                write_rows(stage.folder / f"{name}.npy", parts, dtype=dtype, shape=(len(own), k))
            for number in range(num_blocks):
                mask = stage.read_block(number)["mask"]
                num_missing += int((~mask).sum())
                num_alone += int((~mask[:, 0]).sum())
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
                counts={
                    "chunks": len(own),
                    "missing_neighbors": num_missing,
                    "chunks_without_neighbors": num_alone,
                    "leaks": len(leaks),
                },
                files=["ids.npy", "mask.npy", "distances.npy", "leaks.json"],
            )
    return stage


def warn_of_chunks_alone(neighbors: Neighbors, queries: ChunkTable, database: ChunkTable, kind: str, *, what: str) -> None:
    """Warn if many chunks of a table have no neighbor at all, with the reason and what to do.

    Args:
        neighbors: The neighbors of the chunks of the table.
        queries: The table.
        database: The chunks that can be neighbors.
        kind: Kind of search.
        what: The name of the table in the message.
    """
    alone, num = int((~np.asarray(neighbors.mask[:, 0])).sum()), len(queries)
    if alone <= ALONE * num:
        return
    num_groups, names = len(np.unique(np.asarray(database.groups))), database.document_ids
    if num_groups == 1:
        copies = "" if len(names) == 1 else f", and its {len(names)} documents are near-duplicates of each other"
        reason = (
            f"All chunks of the database are of one document ({names[0]!r}{copies}), and a document never finds itself. Divide"
            " it: pass FileDocuments with the file and the `separator` between its documents, such as '\\n\\n', or add other"
            " documents."
        )
    elif kind == "bm25":
        reason = (
            "They share no word with a chunk of another document. Increase `chunk_size`, which is"
            f" {database.chunk_size} tokens, add documents on the same subjects, or use a dense encoder."
        )
    else:
        reason = f"The database has {len(names)} documents in {num_groups} groups of near-duplicates. Add other documents."
    warnings.warn(
        f"{what}: {alone} of {num} chunks ({alone / num:.0%}) are without neighbors, so retrieval cannot help there. {reason}",
        stacklevel=3,
    )


def _forbidden_documents(queries: ChunkTable, database: ChunkTable, copies: list[Pair], *, same: bool) -> Forbidden:
    """Return the groups that each document of the queries must not find."""
    if same:
        return Forbidden(np.arange(queries.num_documents), np.array(database.groups))
    rows = np.array([pair.first for pair in copies], dtype=np.int64)
    return Forbidden(rows, database.groups[np.array([pair.second for pair in copies], dtype=np.int64)])


def _expand_to_rows(forbidden: Forbidden, documents: Ints) -> Forbidden:
    """Convert forbidden groups per document to forbidden groups per row, given the document of each row."""
    order = np.argsort(forbidden.rows, kind="stable")
    rows, groups = forbidden.rows[order], forbidden.groups[order]
    first, last = np.searchsorted(rows, documents, side="left"), np.searchsorted(rows, documents, side="right")
    counts = last - first
    expanded = np.repeat(np.arange(len(documents)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Forbidden(expanded, groups[np.repeat(first, counts) + offsets])
