"""Near-duplicate documents: MinHash over 13-grams of tokens finds candidates, and exact Jaccard similarity decides.

See Broder 1997 (resemblance), Li, Owen and Zhang 2012 (one permutation, arXiv 1208.1259) and Shrivastava 2017 (empty bins,
arXiv 1703.04664). RETRO (arXiv 2112.04426, section 2.6) filters at a similarity of 0.8 on 13-grams.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
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
_CACHED = 4096
"""Sets of shingles that are kept in memory."""

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
    hashes = _grams(tokens)
    bins = np.full(BINS, _EMPTY)
    np.minimum.at(bins, (hashes % np.uint64(BINS)).astype(np.int64), hashes)
    filled = bins != _EMPTY
    empty, full, block = np.flatnonzero(~filled), bins.copy(), 0
    while len(empty) and len(hashes):
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
    _, first, inverse = np.unique(signatures, axis=0, return_index=True, return_inverse=True)
    parent[:] = first[inverse.reshape(-1)]
    read = lru_cache(maxsize=_CACHED)(shingles_of)
    seen: set[tuple[int, int]] = set()
    for bucket in _candidates(signatures, np.sort(first)):
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
    read_query, read = lru_cache(maxsize=_CACHED)(shingles_of_query), lru_cache(maxsize=_CACHED)(shingles_of)
    best: dict[tuple[int, int], Pair] = {}
    seen: set[tuple[int, int]] = set()
    _, first = np.unique(signatures, axis=0, return_index=True)
    both = np.concatenate([queries, signatures])
    for bucket in _candidates(both, np.concatenate([np.arange(len(queries)), len(queries) + np.sort(first)])):
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


def _candidates(signatures: Hashes, documents: NDArray[Any]) -> Iterator[list[int]]:
    """Yield sets of two or more documents that agree on a band."""
    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        rows = np.ascontiguousarray(signatures[documents, band * ROWS : (band + 1) * ROWS])
        for document, row in zip(documents.tolist(), rows, strict=True):
            buckets[row.tobytes()].append(document)
        yield from (bucket for bucket in buckets.values() if len(bucket) > 1)


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
