"""Sources in blocks of rows, which are read in one process and can be parsed in another."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lightning_align.data.files import Row, kind_of, line_blocks, parse_lines, read_file, read_table, table_rows
from lightning_align.data.rows import RowTask, Source, read_rows, source_files
from lightning_align.data.tables import num_parquet_rows

_ROWS = 1024
"""The largest number of rows in a block that is not of lines."""


class Block(Protocol):
    """Consecutive rows of a source. It can be sent to another process."""

    def rows(self) -> Iterator[Row]:
        """Parse the rows."""
        ...


class Piece(NamedTuple):
    """A block, and how much of the source has been read with it."""

    block: Block
    num_rows: int
    """The number of rows. Blank lines of a file of lines count."""
    reached: float
    """The bytes or rows up to the end of the block. See `Pieces.unit`."""


class Pieces(NamedTuple):
    """A source in blocks."""

    pieces: Iterator[Piece]
    unit: str
    """What the progress counts: ``rows``, or ``B`` for the bytes of the files."""
    total: int | None
    """How many there are. None if it is unknown."""


@dataclass(frozen=True)
class _Lines:
    path: str
    first: int
    lines: bytes

    def rows(self) -> Iterator[Row]:
        return parse_lines(self.path, self.first, self.lines)


@dataclass(frozen=True)
class RowBlock:
    """Rows that are parsed already."""

    parsed: list[Row]

    def rows(self) -> Iterator[Row]:
        """Return the rows."""
        return iter(self.parsed)


class _TableRows:
    """Rows of a table. Only the process that parses them makes Python objects of them."""

    def __init__(self, path: str, first: int, batch: Any) -> None:
        self.path, self.first, self.batch = path, first, batch

    def rows(self) -> Iterator[Row]:
        return table_rows(self.path, self.first, self.batch)

    def __getstate__(self) -> tuple[str, int, bytes]:
        import pyarrow as pa

        # A pickled slice would hold the whole batch.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.batch.schema) as writer:
            writer.write_batch(self.batch)
        return self.path, self.first, sink.getvalue().to_pybytes()

    def __setstate__(self, state: tuple[str, int, bytes]) -> None:
        import pyarrow as pa

        self.path, self.first, data = state
        self.batch = pa.ipc.open_stream(data).read_next_batch()


def read_pieces(source: Source, *, split: str = "train") -> Pieces:
    """Read a source in blocks, in order. The same source always has the same blocks.

    Args:
        source: See `lightning_align.data.rows.read_rows`.
        split: The split of a dataset if its name does not include one.

    Raises:
        ValueError: If the source is missing, unreadable or of an unknown kind.
    """
    files = source_files(source, split=split)
    if files is None:
        rows = read_rows(source, split=split)
        total = len(source) if isinstance(source, RowTask) and isinstance(source, Sized) else None
        return Pieces(_counted(row_blocks(rows)), "rows", total)
    if all(kind_of(file) == ".parquet" for file in files):
        sizes = [num_parquet_rows(file) for file in files]
        unit = "rows"
    else:
        sizes = [Path(file).stat().st_size for file in files]
        unit = "B"
    return Pieces(_file_pieces(files, sizes), unit, sum(sizes))


def row_blocks(rows: Iterable[Row]) -> Iterator[RowBlock]:
    """Yield rows in blocks."""
    rest = iter(rows)
    while block := list(islice(rest, _ROWS)):
        yield RowBlock(block)


def _counted(blocks: Iterable[RowBlock]) -> Iterator[Piece]:
    num_rows = 0
    for block in blocks:
        num_rows += len(block.parsed)
        yield Piece(block, len(block.parsed), num_rows)


def _file_pieces(files: list[str], sizes: list[int]) -> Iterator[Piece]:
    before = 0
    for path, size in zip(files, sizes, strict=True):
        for block, num_rows, share in _blocks(path, size):
            yield Piece(block, num_rows, before + share * size)
        before += size


def _blocks(path: str, size: int) -> Iterator[tuple[Block, int, float]]:
    """Yield the blocks of a file, their numbers of rows, and the share of the file that was read."""
    if kind_of(path) in (".parquet", ".arrow"):
        for first, batch, share in read_table(path):
            yield _TableRows(path, first, batch), batch.num_rows, share
        return
    opened: list[BufferedReader] = []

    def position() -> float:
        return 1.0 if not opened or opened[0].closed else opened[0].tell() / max(size, 1)

    if kind_of(path) in (".jsonl", ".ndjson"):
        for first, lines in line_blocks(path, opened):
            yield _Lines(path, first, lines), lines.count(b"\n"), position()
        return
    for block in row_blocks(read_file(path, opened=opened)):
        yield block, len(block.parsed), position()
