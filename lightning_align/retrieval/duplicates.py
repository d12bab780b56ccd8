"""Near-duplicate documents: MinHash over runs of 13 tokens finds candidates, exact Jaccard similarity decides.

Broder 1997 (resemblance); Li, Owen and Zhang 2012 (one permutation, arXiv 1208.1259); Shrivastava 2017 (empty bins,
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
"""Tokens of a shingle."""
BANDS, ROWS = 25, 5
"""A pair is a candidate if it agrees on all rows of a band: at similarity 0.8 with probability 1 - (1 - 0.8^5)^25 = 0.99995."""
BINS = BANDS * ROWS
THRESHOLD = 0.8
_KEPT = 4096
"""Sets of shingles held in memory."""

_ATTEMPTS = 128
_EMPTY = np.uint64(2**64 - 1)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Pair(NamedTuple):
    """A query document and one of the database that are near-duplicates."""

    first: int
    second: int
    similarity: float


def shingles(tokens: NDArray[Any]) -> Hashes:
    """Sorted distinct hashes of the runs of 13 tokens of a document; of a shorter one the hash of all of it.

    Args:
        tokens: (L,) ids of the text, without the tokens that begin and end every document.
    """
    return np.unique(_grams(tokens))


def signature(tokens: NDArray[Any]) -> Hashes:
    """(BINS,) the least hash in each bin; an empty bin borrows from another one, chosen alike in every document."""
    hashes = _grams(tokens)
    bins = np.full(BINS, _EMPTY)
    np.minimum.at(bins, (hashes % np.uint64(BINS)).astype(np.int64), hashes)
    filled = bins != _EMPTY
    empty, full, block = np.flatnonzero(~filled), bins.copy(), 0
    while len(empty) and len(hashes):
        hit = filled[_lenders(block)[:, empty]]  # (attempts, empty)
        first = hit.argmax(axis=0)
        lent = hit[first, np.arange(len(empty))]
        borrower, attempt = empty[lent], first[lent]
        full[borrower] = _mix(bins[_lenders(block)[attempt, borrower]] + (block * _ATTEMPTS + attempt + 1).astype(np.uint64))
        empty, block = empty[~lent], block + 1
    return full


@lru_cache(maxsize=64)
def _lenders(block: int) -> NDArray[np.int64]:
    """(attempts, BINS) the bin that each bin asks at each of a block's attempts: the first of them that is not empty lends."""
    attempts = np.arange(block * _ATTEMPTS + 1, (block + 1) * _ATTEMPTS + 1, dtype=np.uint64)[:, None]
    return (_mix(np.arange(BINS, dtype=np.uint64) * np.uint64(1_000_003) + attempts) % np.uint64(BINS)).astype(np.int64)


def jaccard(first: Hashes, second: Hashes) -> float:
    """Similarity of two sets of distinct hashes: the size of their intersection over that of their union."""
    both = np.concatenate((first, second))
    both.sort(kind="stable")  # which finds two sorted runs, and merges them
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    union = len(first) + len(second) - common
    return common / union if union else 1.0


def group_documents(signatures: Hashes, shingles_of: Callable[[int], Hashes]) -> NDArray[np.int64]:
    """(D,) the first document of each one's group: near-duplicates, and near-duplicates of those, are in one group.

    Args:
        signatures: (D, BINS).
        shingles_of: the `shingles` of a document, by its number.
    """
    parent = np.arange(len(signatures))

    def root(document: int) -> int:
        while parent[document] != document:
            parent[document] = parent[parent[document]]
            document = int(parent[document])
        return document

    # Copies have one signature; were they not put together first, n of them would be n^2 candidates.
    _, first, inverse = np.unique(signatures, axis=0, return_index=True, return_inverse=True)
    parent[:] = first[inverse.reshape(-1)]
    read = lru_cache(maxsize=_KEPT)(shingles_of)
    seen: set[tuple[int, int]] = set()
    for bucket in _buckets(signatures, np.sort(first)):
        for one, other in combinations(bucket, 2):
            roots = sorted((root(one), root(other)))
            if roots[0] == roots[1] or (one, other) in seen:
                continue
            seen.add((one, other))
            if _agree(signatures[one], signatures[other]) and jaccard(read(one), read(other)) >= THRESHOLD:
                parent[roots[1]] = roots[0]
    return np.array([root(document) for document in range(len(signatures))], dtype=np.int64)


def find_copies(
    queries: Hashes,
    shingles_of_query: Callable[[int], Hashes],
    signatures: Hashes,
    shingles_of: Callable[[int], Hashes],
    groups: NDArray[np.int64],
) -> list[Pair]:
    """Of which groups of a database each query document is a near-duplicate, the most similar pairs first.

    Args:
        queries: (Q, BINS) signatures of documents to look for.
        shingles_of_query: their `shingles`.
        signatures: (D, BINS) of the documents of the database.
        shingles_of: their `shingles`.
        groups: (D,) see `group_documents`.

    Returns:
        Of each query document and group one pair: the most similar of those that were compared.
    """
    read_query, read = lru_cache(maxsize=_KEPT)(shingles_of_query), lru_cache(maxsize=_KEPT)(shingles_of)
    best: dict[tuple[int, int], Pair] = {}
    seen: set[tuple[int, int]] = set()
    _, first = np.unique(signatures, axis=0, return_index=True)
    both = np.concatenate([queries, signatures])
    for bucket in _buckets(both, np.concatenate([np.arange(len(queries)), len(queries) + np.sort(first)])):
        there = [document - len(queries) for document in bucket if document >= len(queries)]
        for query in (document for document in bucket if document < len(queries)):
            for document in there:
                if (query, document) in seen:
                    continue
                seen.add((query, document))
                if not _agree(queries[query], signatures[document]):
                    continue
                similarity = jaccard(read_query(query), read(document))
                place = (query, int(groups[document]))
                if similarity >= THRESHOLD and (place not in best or similarity > best[place].similarity):
                    best[place] = Pair(query, document, similarity)
    return sorted(best.values(), key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _agree(first: Hashes, second: Hashes) -> bool:
    """Whether two signatures leave it open that their documents are near-duplicates: those agree on 0.8 of the bins or so."""
    return int(np.count_nonzero(first == second)) > 0.3 * BINS


def _buckets(signatures: Hashes, documents: NDArray[Any]) -> Iterator[list[int]]:
    """Documents that agree on a band, two or more together."""
    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        rows = np.ascontiguousarray(signatures[documents, band * ROWS : (band + 1) * ROWS])
        for document, row in zip(documents.tolist(), rows, strict=True):
            buckets[row.tobytes()].append(document)
        yield from (bucket for bucket in buckets.values() if len(bucket) > 1)


def _grams(tokens: NDArray[Any]) -> Hashes:
    """Hashes of the runs of 13 tokens, in order, with repetitions."""
    ids = tokens.astype(np.uint64) + np.uint64(1)
    width = min(GRAM, len(ids))
    total = np.zeros(len(ids) - width + 1 if width else 0, dtype=np.uint64)
    for place in range(width):
        total = total * _MULTIPLIER + ids[place : place + len(total)]
    return _mix(total)


def _mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
