"""Tokenizing a source into the files of a store.

A small source is tokenized at once. A source of many rows is tokenized by several processes, in parts that survive an
interruption. The files have the same bytes in every case.
"""

import json
import logging
import os
import shutil
import socket
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pyarrow as pa

from lightning_align.data.blocks import Block, Piece, Pieces, read_pieces
from lightning_align.data.columns import DuplicateCounter, schema_of, store_batches
from lightning_align.data.jobs import Encoded, Job, LabelledRowError, has_plain_texts, mapped_blocks
from lightning_align.data.ledger import DUPLICATE, Ledger
from lightning_align.data.packing import block_batches
from lightning_align.data.parts import Parts, Progress
from lightning_align.data.progress import ProgressBar
from lightning_align.data.recipe import Recipe
from lightning_align.data.rows import Source, source_name
from lightning_align.data.tokenizer import Tokenizer
from lightning_align.data.workers import WorkerEndedError, Workers, num_cores
from lightning_align.runtime.checksums import file_hash, sealed
from lightning_align.runtime.files import locked, publish, publish_text

_SMALL_ROWS = 8192
_SMALL_BLOCKS = 16
"""A source of fewer rows and blocks is tokenized before worker processes would have started."""
_LOCK = ".lock"
_SUFFIXES = (".parts", ".pairs.parts")
"""The folders of the parts. The parts of rows that are paired first are others."""
_logger = logging.getLogger(__name__)
_Results = Iterable[tuple[Piece, Encoded]]


class _Reading(NamedTuple):
    """A source that is being read."""

    pieces: Iterator[Piece]
    first: list[Piece]
    """The first pieces, which ``pieces`` yields too."""
    is_small: bool
    bar: ProgressBar


@dataclass(frozen=True)
class Build:
    """The building of a store.

    Args:
        path: The path of the Arrow file.
        source: The source of the rows.
        split: The split of a hub dataset if its name does not include one.
        recipe: How to encode the rows.
        tokenizer: The tokenizer.
        num_workers: The number of processes that tokenize a source of many rows. 0 is the number of cores, and 1 is this
            process alone.
    """

    path: Path
    source: Source
    split: str
    recipe: Recipe
    tokenizer: Tokenizer
    num_workers: int

    def run(self) -> None:
        """Write the files of the store.

        Raises:
            ValueError: If the source or a row is bad, no row is left, or a file cannot be written.
        """
        try:
            self._run(pairs_rows=False)
        except LabelledRowError:
            self._run(pairs_rows=True)

    def _run(self, *, pairs_rows: bool) -> None:
        ledger = self._new_ledger()
        pieces = read_pieces(self.source, split=self.split)
        with closing(ProgressBar(source_name(self.source), unit=pieces.unit, total=pieces.total)) as bar:
            if pairs_rows:
                pieces = pieces._replace(pieces=_map(pieces.pieces, self.recipe, ledger))
            reading = _begin(pieces, bar)
            job = Job(
                source_name(self.source),
                self.recipe,
                self.tokenizer,
                is_text=has_plain_texts((piece.block for piece in reading.first), self.recipe),
                is_mapped=pairs_rows,
            )
            if reading.is_small:
                progress = self._new_progress()
                results = ((piece, job.run(piece.block)) for piece in reading.pieces)
                batches = [progress.add(encoded) for encoded in _shown(results, bar, progress)]
                self._publish(job, filter(None, batches), ledger, progress)
                return
            self._run_in_parts(job, reading, ledger)

    def _run_in_parts(self, job: Job, reading: _Reading, ledger: Ledger) -> None:
        manifest = self.path.with_suffix(".json")
        before = _signature(manifest)

        def tell(holder: str) -> None:
            _logger.warning("waiting for another process that tokenizes %s (%s)", job.name, holder or "unknown")

        with locked(self.path.with_suffix(_LOCK), on_wait=tell) as is_locked:
            if _signature(manifest) != before:
                return  # the other process has built the store
            suffix = _SUFFIXES[job.is_mapped]
            if not is_locked:
                suffix += f".{socket.gethostname()}.{os.getpid()}.{uuid4().hex[:16]}"
            else:
                for file in self.path.parent.glob(f".{self.path.name}.*.tmp"):
                    file.unlink(missing_ok=True)  # of a process that was killed
            settings = {"text": job.is_text, "max_length": self.recipe.max_length}
            try:
                parts = Parts(self.path.with_suffix(suffix), settings, self._new_progress())
                with closing(parts):
                    if job.is_mapped or not parts.is_complete:
                        self._add_parts(job, reading, parts)
                    self._publish(job, parts.batches(), ledger, parts.progress)
            except OSError as error:
                raise ValueError(
                    f"{self.path}: cannot be written ({error.strerror or error}): choose another path or free it"
                ) from error
            parts.remove()
            if is_locked:
                _remove_parts(self.path)

    def _add_parts(self, job: Job, reading: _Reading, parts: Parts) -> None:
        finished = parts.progress
        rest = _skip(reading, finished)
        if parts.is_complete:
            # Only the ledger of the rows that were read is missing.
            for _ in rest:
                pass
            return
        try:
            with closing(_results(job, rest, self.num_workers)) as results:
                for encoded in _shown(results, reading.bar, finished):
                    parts.add(encoded)
        except WorkerEndedError:
            raise
        except ValueError:
            # Correct rows or other settings make another store. Nothing would ever use these parts.
            parts.remove()
            raise
        parts.finish(is_last=True)

    def _publish(self, job: Job, batches: Iterable[pa.RecordBatch], ledger: Ledger, progress: Progress) -> None:
        """Write the files of encoded rows. Nothing is written if no row is used."""
        if progress.num_rows == 0 and ledger.num_rows == 0:
            raise ValueError(f"{job.name} has no rows. Give a source with at least one row")
        ledger.add(progress.ledger)
        ledger.close()
        duplicates = DuplicateCounter()
        batches = duplicates.watch(batches)
        if job.is_text:
            batches = block_batches(batches, max_length=self.recipe.max_length)
        num_stored, digest = 0, ""

        def write(temporary: Path) -> None:
            nonlocal num_stored, digest
            rows = store_batches(batches)
            first = next(rows, None)
            schema = schema_of(1) if first is None else first.schema
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in rows if first is None else chain([first], rows):
                    writer.write_batch(batch)
                    num_stored += batch.num_rows
            digest = file_hash(temporary)

        publish(self.path, write)
        if num_duplicates := duplicates.count():
            ledger.notes[DUPLICATE] += num_duplicates
        size = self.path.stat().st_size
        content = {"ledger": ledger.to_dict(), "num_stored": num_stored, "num_bytes": size, "sha256": digest}
        publish_text(self.path.with_suffix(".json"), json.dumps(sealed(content), indent=2, ensure_ascii=False))

    def _new_ledger(self) -> Ledger:
        return Ledger(source_name(self.source), on_bad_row=self.recipe.on_bad_row)

    def _new_progress(self) -> Progress:
        return Progress(0, 0, 0, self._new_ledger())


def clean(path: Path) -> None:
    """Remove what a process left that was killed after it had built a store, before it had removed the parts."""
    if any(path.with_suffix(suffix).exists() for suffix in (*_SUFFIXES, _LOCK)):
        with locked(path.with_suffix(_LOCK), on_wait=lambda _: None) as is_locked:
            if is_locked:
                _remove_parts(path)


def _remove_parts(path: Path) -> None:
    for suffix in _SUFFIXES:
        shutil.rmtree(path.with_suffix(suffix), ignore_errors=True)


def _begin(pieces: Pieces, bar: ProgressBar) -> _Reading:
    """Read the first pieces of a source, until it is certain that it is not small."""
    first: list[Piece] = []
    problem: Exception | None = None
    is_small = True
    num_rows = 0
    try:
        for piece in pieces.pieces:
            first.append(piece)
            num_rows += piece.num_rows
            if num_rows >= _SMALL_ROWS or len(first) >= _SMALL_BLOCKS:
                is_small = False
                break
    except Exception as error:
        # It is raised behind the pieces that were read before it, so that a bad row in them is reported first.
        problem = error

    def rest() -> Iterator[Piece]:
        yield from first
        if problem is not None:
            raise problem
        yield from pieces.pieces

    return _Reading(rest(), list(first), is_small, bar)


def _map(pieces: Iterator[Piece], recipe: Recipe, ledger: Ledger) -> Iterator[Piece]:
    """Convert the rows of all pieces in order, and yield pieces of the converted rows."""
    reached = 0.0

    def rows() -> Iterator[Block]:
        nonlocal reached
        for piece in pieces:
            reached = piece.reached
            yield piece.block

    blocks = mapped_blocks((row for block in rows() for row in block.rows()), recipe, ledger)
    for block in blocks:
        yield Piece(block, len(block.parsed), reached)


def _skip(reading: _Reading, finished: Progress) -> Iterator[Piece]:
    """Yield the pieces behind the finished ones. The finished ones are read again, but not parsed."""
    for number, piece in enumerate(reading.pieces):
        if number >= finished.num_blocks:
            yield piece
        elif number == finished.num_blocks - 1:
            reading.bar.skip(piece.reached, num_rows=finished.num_rows)


def _results(job: Job, pieces: Iterator[Piece], num_workers: int) -> Generator[tuple[Piece, Encoded]]:
    """Encode pieces by several processes and yield the results in order."""
    num_workers = num_workers or num_cores()
    if num_workers > 1:
        try:
            workers = Workers(job, num_workers)
        except ValueError as error:
            _logger.warning("%s. One process tokenizes them.", error)
        else:
            with workers:
                yield from workers.run((piece, piece.block) for piece in pieces)
            return
    for piece in pieces:
        yield piece, job.run(piece.block)


def _shown(results: _Results, bar: ProgressBar, progress: Progress) -> Iterator[Encoded]:
    """Yield results and show each of them. The caller adds them to the progress."""
    for piece, encoded in results:
        yield encoded
        bar.update(piece.reached, num_rows=progress.num_rows)


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
