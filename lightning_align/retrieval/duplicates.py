"""Near-duplicate documents: MinHash over 13-grams of tokens finds candidates, and exact Jaccard similarity decides.

See Broder 1997 (resemblance), Li, Owen and Zhang 2012 (one permutation, arXiv 1208.1259) and Shrivastava 2017 (empty bins,
arXiv 1703.04664). RETRO (arXiv 2112.04426, section 2.6) filters at a similarity of 0.8 on 13-grams.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

GRAM = 13
"""Tokens per shingle."""
BANDS, ROWS = 25, 5
"""A pair is a candidate if it agrees on all rows of a band.

At similarity 0.8 the probability of this is 1 - (1 - 0.8^5)^25 = 0.99995.
"""
BINS = BANDS * ROWS
THRESHOLD = 0.8
_CACHED = 1 << 25
"""Shingles that are kept in memory, 256 MiB."""
_BLOCK = 1 << 14
"""Signatures that are read at a time."""

_ATTEMPTS = 128
_EMPTY = np.uint64(2**64 - 1)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Pair(NamedTuple):
    """A query document and a document of the database that are near-duplicates."""

    first: int
    second: int
    similarity: float


def shingles(tokens: NDArray[Any]) -> Hashes:
    """Compute the sorted distinct hashes of the 13-grams of a document. A shorter document has one hash, of all its tokens.

    Args:
        tokens: (L,) ids of the text, without beginning- and end-of-sequence tokens.
    """
    return np.unique(_grams(tokens))


def signature(tokens: NDArray[Any]) -> Hashes:
    """Compute the MinHash signature (BINS,) of a document: the smallest hash of each bin.

    An empty bin takes the hash of another bin. Which bins it tries is the same for every document.

    Args:
        tokens: (L,) ids of the text, without beginning- and end-of-sequence tokens.
    """
    return _filled(_smallest(_grams(tokens)))


def signature_of_parts(parts: Iterable[NDArray[Any]]) -> Hashes:
    """Compute the `signature` of a document that is given in parts, in memory that does not grow with the document."""
    bins, rest = np.full(BINS, _EMPTY), np.zeros(0, dtype=np.int64)
    for part in parts:
        run = np.concatenate([rest, part])
        if len(run) >= GRAM:
            np.minimum(bins, _smallest(_grams(run)), out=bins)
        rest = run[1 - GRAM :]
    return _filled(bins) if (bins != _EMPTY).any() else signature(rest)


def _smallest(hashes: Hashes) -> Hashes:
    """Return the smallest hash of each bin (BINS,), `_EMPTY` where there is none."""
    bins = np.full(BINS, _EMPTY)
    np.minimum.at(bins, (hashes % np.uint64(BINS)).astype(np.int64), hashes)
    return bins


def _filled(bins: Hashes) -> Hashes:
    filled = bins != _EMPTY
    empty, full, block = np.flatnonzero(~filled), bins.copy(), 0
    while len(empty) and filled.any():
        hit = filled[_donor_bins(block)[:, empty]]  # (attempts, empty)
        first = hit.argmax(axis=0)
        donated = hit[first, np.arange(len(empty))]
        receiver, attempt = empty[donated], first[donated]
        full[receiver] = _mix(bins[_donor_bins(block)[attempt, receiver]] + (block * _ATTEMPTS + attempt + 1).astype(np.uint64))
        empty, block = empty[~donated], block + 1
    return full


@lru_cache(maxsize=64)
def _donor_bins(block: int) -> NDArray[np.int64]:
    """Return the bins (attempts, BINS) that each empty bin tries in turn. The first that is not empty provides the hash."""
    attempts = np.arange(block * _ATTEMPTS + 1, (block + 1) * _ATTEMPTS + 1, dtype=np.uint64)[:, None]
    return (_mix(np.arange(BINS, dtype=np.uint64) * np.uint64(1_000_003) + attempts) % np.uint64(BINS)).astype(np.int64)


def jaccard(first: Hashes, second: Hashes) -> float:
    """Compute the Jaccard similarity of two sets of distinct hashes: size of the intersection over size of the union."""
    both = np.concatenate((first, second))
    both.sort(kind="stable")  # detects the two sorted runs and merges them
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    union = len(first) + len(second) - common
    return common / union if union else 1.0


def group_documents(signatures: Hashes, shingles_of: Callable[[int], Hashes]) -> NDArray[np.int64]:
    """Group near-duplicate documents. Near-duplicates of near-duplicates are in the same group.

    Args:
        signatures: (D, BINS) signatures of the documents.
        shingles_of: Returns the `shingles` of a document, given by its number.

    Returns:
        (D,) number of the first document of each document's group.
    """
    parent = np.arange(len(signatures))

    def root(document: int) -> int:
        while parent[document] != document:
            parent[document] = parent[parent[document]]
            document = int(parent[document])
        return document

    # Copies have the same signature. Group them first, because n copies would be n^2 candidate pairs.
    parent[:] = first = _first_equal(signatures)
    read = _Cache(shingles_of)
    seen: set[tuple[int, int]] = set()
    for bucket in _candidates(_bands(signatures, np.unique(first))):
        for one, other in combinations(bucket, 2):
            roots = sorted((root(one), root(other)))
            if roots[0] == roots[1] or (one, other) in seen:
                continue
            seen.add((one, other))
            if _may_be_similar(signatures[one], signatures[other]) and jaccard(read(one), read(other)) >= THRESHOLD:
                parent[roots[1]] = roots[0]
    return np.array([root(document) for document in range(len(signatures))], dtype=np.int64)


def find_copies(
    queries: Hashes,
    shingles_of_query: Callable[[int], Hashes],
    signatures: Hashes,
    shingles_of: Callable[[int], Hashes],
    groups: NDArray[np.int64],
) -> list[Pair]:
    """Find the near-duplicates of query documents in a database.

    Args:
        queries: (Q, BINS) signatures of the query documents.
        shingles_of_query: Returns the `shingles` of a query document, given by its number.
        signatures: (D, BINS) signatures of the documents of the database.
        shingles_of: Returns the `shingles` of a document of the database, given by its number.
        groups: (D,) group of each document of the database, see `group_documents`.

    Returns:
        A pair for each query document and each group that has a near-duplicate of it: the most similar pair that was compared.
        The most similar pairs come first.
    """
    read_query, read = _Cache(shingles_of_query), _Cache(shingles_of)
    best: dict[tuple[int, int], Pair] = {}
    seen: set[tuple[int, int]] = set()
    stored_bands = _bands(signatures, np.unique(_first_equal(signatures)))
    stored_bands.documents += len(queries)
    for bucket in _candidates(_bands(queries, np.arange(len(queries))), stored_bands):
        stored = [document - len(queries) for document in bucket if document >= len(queries)]
        for query in (document for document in bucket if document < len(queries)):
            for document in stored:
                if (query, document) in seen:
                    continue
                seen.add((query, document))
                if not _may_be_similar(queries[query], signatures[document]):
                    continue
                similarity = jaccard(read_query(query), read(document))
                key = (query, int(groups[document]))
                if similarity >= THRESHOLD and (key not in best or similarity > best[key].similarity):
                    best[key] = Pair(query, document, similarity)
    return sorted(best.values(), key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _may_be_similar(first: Hashes, second: Hashes) -> bool:
    """Whether two documents can be near-duplicates by their signatures. Near-duplicates agree on about 0.8 of the bins."""
    return int(np.count_nonzero(first == second)) > 0.3 * BINS


class _Cache:
    """The sets of shingles that were read last, as many as fit into `_CACHED`."""

    def __init__(self, read: Callable[[int], Hashes]) -> None:
        self._read, self._size = read, 0
        self._sets: OrderedDict[int, Hashes] = OrderedDict()

    def __call__(self, document: int) -> Hashes:
        if document in self._sets:
            self._sets.move_to_end(document)
            return self._sets[document]
        found = self._read(document)
        self._sets[document] = found
        self._size += len(found)
        while self._size > _CACHED and len(self._sets) > 1:
            self._size -= len(self._sets.popitem(last=False)[1])
        return found


def _first_equal(signatures: Hashes) -> NDArray[np.int64]:
    """Return the number (D,) of the first document that has the same signature."""
    keys = np.concatenate([_fold(part) for part in _blocks(signatures)]) if len(signatures) else np.zeros(0, dtype=np.uint64)
    _, places, inverse = np.unique(keys, return_index=True, return_inverse=True)
    first: NDArray[np.int64] = places[inverse.reshape(-1)]
    for start in range(0, len(first), _BLOCK):  # keys can collide
        numbers = np.arange(start, min(start + _BLOCK, len(first)))
        differ = (signatures[first[numbers]] != signatures[numbers]).any(axis=1)
        first[numbers[differ]] = numbers[differ]
    return first


class _Bands:
    """A key of each band of documents, equal where all rows of the band are."""

    def __init__(self, documents: NDArray[np.int64], keys: Hashes) -> None:
        self.documents, self.keys = documents, keys
        """(n,) and (n, BANDS)."""


def _bands(signatures: Hashes, documents: NDArray[np.int64]) -> _Bands:
    parts = [
        _fold(np.asarray(signatures[documents[start : start + _BLOCK]]).reshape(-1, BANDS, ROWS))
        for start in range(0, len(documents), _BLOCK)
    ]
    return _Bands(documents, np.concatenate(parts) if parts else np.zeros((0, BANDS), dtype=np.uint64))


def _candidates(*sides: _Bands) -> Iterator[list[int]]:
    """Yield sets of two or more documents that agree on a band. Each set is ascending."""
    documents = np.concatenate([side.documents for side in sides])
    for band in range(BANDS):
        keys = np.concatenate([side.keys[:, band] for side in sides])
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[:1]] + np.uint64(1)))
        sizes = np.diff(starts, append=len(order))
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            yield documents[order[start : start + size]].tolist()


def _blocks(signatures: Hashes) -> Iterator[Hashes]:
    return (np.asarray(signatures[start : start + _BLOCK]) for start in range(0, len(signatures), _BLOCK))


def _fold(values: Hashes) -> Hashes:
    """Hash the last dimension."""
    total = np.zeros(values.shape[:-1], dtype=np.uint64)
    for column in range(values.shape[-1]):
        total = _mix(total * _MULTIPLIER + values[..., column])
    return total


def _grams(tokens: NDArray[Any]) -> Hashes:
    """Compute the hashes of the 13-grams, in order, with repetitions."""
    ids = tokens.astype(np.uint64) + np.uint64(1)
    width = min(GRAM, len(ids))
    total = np.zeros(len(ids) - width + 1 if width else 0, dtype=np.uint64)
    for offset in range(width):
        total = total * _MULTIPLIER + ids[offset : offset + len(total)]
    return _mix(total)


def _mix(values: Hashes) -> Hashes:
    """Apply the finalizer of splitmix64, in which every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
