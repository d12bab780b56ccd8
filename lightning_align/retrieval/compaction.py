"""Removes from disk what no search finds any more: deleted documents, and the stages of former generations."""

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.chunks import FORMAT, Content, write_table
from lightning_align.retrieval.encoders import read_vectors
from lightning_align.retrieval.sealed import STAGE_NAME
from lightning_align.retrieval.stages import MANIFEST, Stage, Team, digest, open_stage, write_rows
from lightning_align.retrieval.tables import ChunkTable

ROWS = 1 << 16
"""Vectors that are copied at once."""


def keep_documents(root: Path, before: Stage, *, deleted: Collection[int], team: Team) -> Stage:
    """Copy the chunks of all documents but the deleted ones. The kept documents stay in order and get new numbers.

    Args:
        root: Folder of the database.
        before: The finished chunk stage.
        deleted: Numbers of the documents to leave out.
        team: The ranks. Rank 0 does the work and the others wait.
    """
    dropped = sorted(deleted)
    stage = Stage(root, "chunks", {"format": FORMAT, "kept": before.key, "without": digest(dropped)[:16]})
    with team.together():
        if team.rank == 0 and not stage.is_finished():
            table = ChunkTable(before.folder)
            keep = _kept(table, dropped)
            runs = _runs(keep)

            def spans(offsets: NDArray[np.int64], values: NDArray[Any]) -> Iterator[NDArray[Any]]:
                return (values[offsets[start] : offsets[stop]] for start, stop in runs)

            content = Content(
                tokens=lambda: spans(table.token_offsets, table.tokens),
                num_bytes=(lambda: spans(table.chunk_offsets, table.num_bytes)) if table.has_byte_counts else None,
                lengths=np.diff(table.token_offsets)[keep],
                signatures=lambda: (table.signatures[start:stop] for start, stop in runs),
                sketches=lambda: spans(table.sketch_offsets, table.sketches),
                sketch_lengths=np.diff(table.sketch_offsets)[keep],
                sketch_limits=table.sketch_limits[keep],
                names=[table.document_ids[number] for number in keep],
            )
            write_table(stage, content, table.settings, {})
    return stage


def keep_vectors(root: Path, before: Stage, chunks: Stage, *, all_chunks: Stage, deleted: Collection[int], team: Team) -> Stage:
    """Copy the vectors of the chunks that `keep_documents` kept. Nothing is encoded again.

    Args:
        root: Folder of the database.
        before: The finished vectors of `all_chunks`.
        chunks: What `keep_documents` returned.
        all_chunks: The chunk stage that it copied from.
        deleted: Numbers of the documents that it left out.
        team: The ranks. Rank 0 does the work and the others wait.
    """
    stage = Stage(root, "vectors", {**before.inputs, "chunks": chunks.key})
    with team.together():
        if team.rank == 0 and not stage.is_finished():
            table, vectors, manifest = ChunkTable(all_chunks.folder), read_vectors(before), before.manifest()
            assert manifest is not None
            offsets = table.chunk_offsets
            runs = _runs(_kept(table, deleted))

            def parts() -> Iterator[NDArray[Any]]:
                for first, last in runs:
                    for start in range(int(offsets[first]), int(offsets[last]), ROWS):
                        yield vectors[start : min(start + ROWS, int(offsets[last]))]

            size = len(ChunkTable(chunks.folder))
            write_rows(stage.folder / "vectors.npy", parts(), dtype=vectors.dtype, shape=(size, vectors.shape[1]))
            stage.finish(table=manifest["table"], counts={"chunks": size}, files=["vectors.npy"])
    return stage


def remove_unused(root: Path, head: Mapping[str, Any]) -> list[str]:
    """Remove the folders of stages that a generation does not need. Call it on one rank, after the generation is published.

    A process that has mapped their files goes on with them.

    Args:
        root: Folder of the database.
        head: The manifest of the generation.

    Returns:
        The names of the folders.
    """
    used = {*head["stages"].values(), *(name for stages in head["queries"].values() for name in stages.values())}
    kept_chunks = {name.partition("-")[2] for name in used if name.startswith("chunks-")}
    removed = []
    for folder in sorted(root.iterdir()):
        # Other files in the folder of a database are left alone.
        if not STAGE_NAME.fullmatch(folder.name) or folder.name in used or not folder.is_dir():
            continue
        # Vectors of query sets are not named in the head. The next build finds them by their key.
        if folder.name.startswith("vectors-") and _chunks_of(folder) in kept_chunks:
            continue
        # The manifest goes first: a folder that is removed in part must not count as finished.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
        removed.append(folder.name)
    return removed


def forget_stages(root: Path) -> None:
    """Mark all stages but chunks as not finished. Chunks are found by the hash of their text, and are compared with theirs.

    Args:
        root: Folder of the database.
    """
    for folder in root.iterdir():
        if STAGE_NAME.fullmatch(folder.name) and not folder.name.startswith("chunks-"):
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder / "blocks", ignore_errors=True)


def _chunks_of(folder: Path) -> str | None:
    try:
        return str(open_stage(folder).inputs.get("chunks"))
    except ValueError:  # it is not finished
        return None


def _kept(table: ChunkTable, deleted: Collection[int]) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(table.num_documents), sorted(deleted))


def _runs(numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the ranges (first, last + 1) of consecutive numbers."""
    if not len(numbers):
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, breaks)]
