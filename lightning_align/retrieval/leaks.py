"""The leak audit: which held-out documents have their text, or a part of it, in a database."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.duplicates import RATE, Hashes
from lightning_align.retrieval.tables import ChunkTable, Ints

SHARE = 0.3
"""A held-out document leaks if a document of the database has this fraction of its shingles."""
EVERYWHERE = 0.8
"""It also leaks if the database has this fraction of its shingles in any documents together."""
COMMON = 10
"""Shingles of more documents that are not near-duplicates of each other are common, such as those of a license. They do not
tell that one document is a copy of another."""
FEWEST = 8
"""The fewest sampled shingles of a document that tell how much of it is anywhere in the database."""
_BLOCK = 1 << 20
"""Hashes of the database that are read at a time."""
_FLOOR = np.uint64(2**64 // RATE)


class Pair(NamedTuple):
    """A query document and a document of the database that has a part of its text."""

    first: int
    second: int
    similarity: float
    """The fraction of the text of the query document, estimated."""


class _Queries(NamedTuple):
    """The sketches of all query documents, as one sorted array."""

    hashes: Hashes
    owners: Ints
    """The document of each hash."""
    unique: Hashes
    starts: Ints
    """Where the equal hashes of each entry of `unique` begin in `hashes`, and the number of all."""


def find_leaks(queries: ChunkTable, database: ChunkTable) -> list[Pair]:
    """Find held-out documents of which a database has a copy or a part.

    The database is read twice, in blocks. What is held grows with the held-out documents and with the shingles that are found.

    Args:
        queries: Held-out documents, which should not be in the database.
        database: The chunks of the database.

    Returns:
        A pair for each query document and each group of near-duplicates that has enough of its text: that with the largest
        fraction. The largest fractions come first.
    """
    own = _sorted(queries)
    groups, limits = np.asarray(database.groups), np.asarray(database.sketch_limits)
    # How many documents have each hash, not counting further copies of a document, and the first of them.
    num_documents = np.zeros(len(own.unique), dtype=np.int64)
    first = np.full(len(own.unique), -1, dtype=np.int64)
    for places, documents in _matches(own.unique, database):
        originals = groups[documents] == documents
        np.add.at(num_documents, places[originals], 1)
        new = first[places] < 0
        first[places[new][::-1]] = documents[new][::-1]
    telling = np.flatnonzero((num_documents <= COMMON) & (first >= 0))
    best: dict[tuple[int, int], Pair] = {}

    # A text of one shingle, such as a line of a table, does not tell a copy from a statement of the same fact.
    is_long = np.diff(queries.sketch_offsets) > 1

    def consider(query: int, document: int, share: float) -> None:
        if not is_long[query]:
            return
        key = (query, int(groups[document]))
        if key not in best or share > best[key].similarity:
            best[key] = Pair(query, document, share)

    counts: dict[tuple[int, int], int] = {}
    for places, documents in _matches(own.unique[telling], database):
        places = telling[places]
        repeats = own.starts[places + 1] - own.starts[places]
        rows = np.repeat(own.starts[places], repeats) + _counting(repeats)
        pairs, hits = np.unique(np.stack([own.owners[rows], np.repeat(documents, repeats)]), axis=1, return_counts=True)
        for query, document, number in zip(*pairs.tolist(), hits.tolist(), strict=True):
            counts[query, document] = counts.get((query, document), 0) + number
    for (query, document), number in counts.items():
        hashes, limit = queries.sketch(query)
        compared = int(np.searchsorted(hashes, min(limit, limits[document]), side="right"))
        if number >= SHARE * compared:
            consider(query, document, number / compared)
    flagged = {query for query, _ in best}
    for query in set(range(queries.num_documents)) - flagged:
        hashes, _ = queries.sketch(query)
        sampled = np.searchsorted(own.unique, hashes[: np.searchsorted(hashes, _FLOOR, side="right")])
        found = first[sampled]
        if len(found) >= FEWEST and (share := float(np.mean(found >= 0))) >= EVERYWHERE:
            numbers, hits = np.unique(found[found >= 0], return_counts=True)
            consider(query, int(numbers[hits.argmax()]), share)
    return sorted(best.values(), key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _sorted(table: ChunkTable) -> _Queries:
    owners = np.repeat(np.arange(table.num_documents), np.diff(table.sketch_offsets))
    hashes = np.asarray(table.sketches)
    order = np.argsort(hashes, kind="stable")
    unique, starts = np.unique(hashes[order], return_index=True)
    return _Queries(hashes[order], owners[order], unique, np.append(starts, len(hashes)))


def _matches(hashes: Hashes, database: ChunkTable) -> Iterator[tuple[Ints, Ints]]:
    """Yield the places of sorted hashes that a database has, with the document, for one block of the database after another."""
    if not len(hashes):
        return
    for start in range(0, len(database.sketches), _BLOCK):
        block = np.asarray(database.sketches[start : start + _BLOCK])
        places = np.minimum(np.searchsorted(hashes, block), len(hashes) - 1)
        found = np.flatnonzero(hashes[places] == block)
        documents = np.searchsorted(database.sketch_offsets, start + found, side="right") - 1
        yield places[found], documents


def _counting(repeats: Ints) -> NDArray[np.int64]:
    """Return 0, 1, ... for each number of repeats, one after the other."""
    return np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
