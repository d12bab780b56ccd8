"""Reading of Parquet and Arrow files in batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

_ROWS = 1024
_BUFFER = 1 << 20
_MAPPED_BYTES = 1 << 26
"""The size of a batch of an Arrow file above which it is mapped instead of read."""


def table_batches(path: str, kind: str, raw: BufferedReader) -> Iterator[tuple[int, Any, float]]:
    """Yield the rows of a table in batches of at most 1024.

    Args:
        path: The file.
        kind: ``.parquet`` or ``.arrow``.
        raw: The open file.

    Returns:
        The number of the first row, from 1, a batch, and the share of the file that was read.

    Raises:
        ValueError: If the file cannot be read.
    """
    import pyarrow as pa

    first = 1
    with _errors(path, kind, lambda: first):
        if kind == ".parquet":
            for first, batch, share in _parquet(raw):
                yield first, batch, share
                first += batch.num_rows  # for the message of an error
            return
        is_file = raw.peek(6)[:6] == b"ARROW1"
        with pa.memory_map(path) as mapped:
            sample = next(_record_batches(mapped, is_file), None)
            # The pages of a mapped file count as memory of the process, but a batch that does not fit has to be mapped.
            is_large = sample is not None and sample.nbytes > _MAPPED_BYTES
        with pa.memory_map(path) if is_large else pa.OSFile(path) as source:
            size = Path(path).stat().st_size
            for batch in _record_batches(source, is_file):
                for start in range(0, batch.num_rows, _ROWS):
                    part = batch.slice(start, _ROWS)
                    yield first, part, source.tell() / size
                    first += part.num_rows


def _parquet(raw: BufferedReader) -> Iterator[tuple[int, Any, float]]:
    import pyarrow.parquet as pq

    # Without a buffer, all bytes of a column of a row group are read at once, which may be all rows of the file.
    file = pq.ParquetFile(raw, buffer_size=_BUFFER)
    first = 1
    for batch in file.iter_batches(batch_size=_ROWS):
        yield first, batch, (first - 1 + batch.num_rows) / file.metadata.num_rows
        first += batch.num_rows


def parse_batch(path: str, kind: str, first: int, batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the fields and the origin of each row of a batch.

    Raises:
        ValueError: If a value cannot be converted.
    """
    with _errors(path, kind, lambda: first):
        rows = batch.to_pylist()
    for number, fields in enumerate(rows, start=first):
        yield fields, f"{path}, row {number}"


def num_parquet_rows(path: str) -> int:
    """Return the number of rows of a Parquet file.

    Raises:
        ValueError: If the file cannot be read.
    """
    import pyarrow.parquet as pq

    with _errors(path, ".parquet", lambda: 1):
        return int(pq.read_metadata(path).num_rows)


@contextmanager
def _errors(path: str, kind: str, first: Callable[[], int]) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}, after row {first() - 1}: cannot be read as {kind[1:].title()} ({error}). "
            "The file may be incomplete. Download or write it again."
        ) from error


def _record_batches(source: Any, is_file: bool) -> Iterator[Any]:
    import pyarrow as pa

    if not is_file:
        return iter(pa.ipc.open_stream(source))
    reader = pa.ipc.open_file(source)
    return (reader.get_batch(i) for i in range(reader.num_record_batches))
