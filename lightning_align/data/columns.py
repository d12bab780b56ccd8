"""Encoded rows as Arrow arrays, and their batches in the file of a store."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_align.data.encode import EncodedRow

ROWS_PER_BATCH = 1024
CONTENT = "content"
"""The column of a hash of the ids, which finds duplicates. A store does not keep it."""


def schema_of(num_sides: int) -> pa.Schema:
    """Return the columns of a store.

    Args:
        num_sides: 2 for pairs, otherwise 1.
    """
    fields = [("row", pa.int64()), ("num_prompt", pa.int32())]
    if num_sides == 2:
        fields += [("weight", pa.float64()), ("margin", pa.float64())]
    for side in range(num_sides):
        fields.append((f"tokens_{side}", pa.list_(pa.int32())))
        fields.append((f"targets_{side}", pa.list_(pa.bool_())))
        fields.append((f"num_bytes_{side}", pa.int64()))
    return pa.schema(fields)


def to_batch(rows: Sequence[EncodedRow], *, vocab_size: int) -> pa.RecordBatch | None:
    """Convert rows to a batch with the columns of a store and `CONTENT`. None if there are no rows.

    Args:
        rows: The rows.
        vocab_size: The vocabulary size of the tokenizer, which no id reaches.

    Raises:
        ValueError: If an id is outside the vocabulary.
    """
    if not rows:
        return None
    num_sides = len(rows[0].sides)
    arrays = [pa.array([row.row for row in rows], pa.int64()), pa.array([row.num_prompt for row in rows], pa.int32())]
    if num_sides == 2:
        arrays += [pa.array([row.weight for row in rows], pa.float64()), pa.array([row.margin for row in rows], pa.float64())]
    digests = [hashlib.blake2b(digest_size=8) for _ in rows]
    for side in range(num_sides):
        sides = [row.sides[side] for row in rows]
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(tokens) for tokens, _, _ in sides], out=starts[1:])
        tokens = np.fromiter(chain.from_iterable(tokens for tokens, _, _ in sides), dtype=np.int64, count=starts[-1])
        check_ids(tokens, vocab_size)
        tokens = tokens.astype(np.int32)
        targets = np.fromiter(chain.from_iterable(targets for _, targets, _ in sides), dtype=np.bool_, count=starts[-1])
        arrays += [_lists(starts, tokens), _lists(starts, targets), pa.array([size for _, _, size in sides], pa.int64())]
        for digest, start, stop in zip(digests, starts.tolist(), starts[1:].tolist(), strict=False):
            digest.update((stop - start).to_bytes(8, "little"))
            digest.update(tokens[start:stop].data)
    contents = np.frombuffer(b"".join(digest.digest() for digest in digests), dtype=np.int64)
    schema = schema_of(num_sides).append(pa.field(CONTENT, pa.int64()))
    return pa.RecordBatch.from_arrays([*arrays, pa.array(contents)], schema=schema)


def check_ids(tokens: np.ndarray[Any, Any], vocab_size: int) -> None:
    """Check that ids are in the vocabulary.

    Raises:
        ValueError: If one is not.
    """
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"the tokenizer produced ids from {tokens.min()} to {tokens.max()}, but its vocabulary size is {vocab_size}."
            " The tokenizer file is damaged. Write or download it again."
        )


class DuplicateCounter:
    """A counter of the rows with the ids of an earlier row. It holds 8 bytes per row."""

    def __init__(self) -> None:
        self._contents = [np.zeros(0, dtype=np.int64)]

    def watch(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield batches, and remember the hashes of their rows, if they have some."""
        for batch in batches:
            if CONTENT in batch.schema.names:
                # A copy, because an array of Arrow keeps the whole batch in memory.
                self._contents.append(batch[CONTENT].to_numpy().copy())
            yield batch

    def count(self) -> int:
        """Return the number of duplicates."""
        hashes = np.concatenate(self._contents)
        hashes.sort()
        return int((hashes[1:] == hashes[:-1]).sum())


def store_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield rows in the batches of a store: 1024 rows in each but the last, whatever batches they come in.

    The buffers are written anew, so that the bytes of the file depend on the rows alone.
    """
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in batches:
        waiting.append(batch)
        num_waiting += batch.num_rows
        if num_waiting >= ROWS_PER_BATCH:
            table = pa.Table.from_batches(waiting)
            num_whole = num_waiting - num_waiting % ROWS_PER_BATCH
            for start in range(0, num_whole, ROWS_PER_BATCH):
                yield _rewritten(table.slice(start, ROWS_PER_BATCH))
            waiting, num_waiting = table.slice(num_whole).to_batches(), num_waiting - num_whole
    if num_waiting:
        yield _rewritten(pa.Table.from_batches(waiting))


def _rewritten(table: pa.Table) -> pa.RecordBatch:
    schema = schema_of(2 if "tokens_1" in table.column_names else 1)
    arrays = []
    for field in schema:
        column = table[field.name]
        if not pa.types.is_list(field.type):
            arrays.append(pa.array(column.to_numpy()))
            continue
        starts = np.zeros(len(column) + 1, dtype=np.int32)
        np.cumsum(pc.list_value_length(column).to_numpy(), out=starts[1:])
        arrays.append(_lists(starts, pc.list_flatten(column).to_numpy()))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lists(starts: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))
