"""Near-duplicate documents and leaks. Texts are compared, not token ids, so the tokenizer makes no difference.

A text is reduced to its letters and digits, in one Unicode form and without case, before it is cut into shingles of 32
characters. White space, line ends, indentation, line breaks and punctuation make no difference then. MinHash finds candidates
for near-duplicates, and the Jaccard similarity of sketches decides. A sketch has all hashes of a short document, and the
smallest of a long one, at least one in 16. Leaks are found by the hashes that a held-out document shares with each document.

See Broder 1997 (resemblance and containment), Li, Owen and Zhang 2012 (one permutation, arXiv 1208.1259) and Shrivastava 2017
(empty bins, arXiv 1703.04664). RETRO (arXiv 2112.04426, section 2.6) filters at a Jaccard similarity of 0.8.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

WINDOW = 32
"""Characters per shingle. A power of 2."""
RATE, KEPT = 16, 256
"""A sketch has one hash in `RATE`, and at least `KEPT` if the document has as many."""
BANDS, ROWS = 25, 5
"""A pair is a candidate if it agrees on all rows of a band.

At similarity 0.8 the probability of this is 1 - (1 - 0.8^5)^25 = 0.99995.
"""
BINS = BANDS * ROWS
THRESHOLD = 0.8
"""The Jaccard similarity of near-duplicates."""
_CACHED = 4096
"""Sketches that are kept in memory."""

_ATTEMPTS = 128
_EMPTY = np.uint64(2**64 - 1)
_ALL = np.uint64(2**64 - 1)
"""The limit of a sketch that has all hashes."""
_FLOOR = np.uint64(2**64 // RATE)
"""Each sketch has all hashes below this."""
_SEEDS = [np.uint64(0x9E3779B97F4A7C15 + 2 * level * 0x5851F42D4C957F2D & (2**64 - 1)) | np.uint64(1) for level in range(8)]
_NOT_LETTERS = re.compile(r"[\W_]+")
_ASCII_OTHERS = bytes(code for code in range(128) if not chr(code).isalnum())


class Sketch(NamedTuple):
    """The smallest shingle hashes of a document."""

    hashes: Hashes
    """Sorted, distinct."""
    limit: np.uint64
    """The sketch has all hashes of the document up to this."""


def letters(text: str) -> NDArray[np.uint32]:
    """Return the letters and digits of a text, as numbers, in one Unicode form (NFKC) and without case."""
    if text.isascii():
        return np.frombuffer(text.lower().encode().translate(None, _ASCII_OTHERS), dtype=np.uint8).astype(np.uint32)
    return _numbers(_NOT_LETTERS.sub("", _one_form(text)))


def shingles(text: str) -> Hashes:
    """Compute the hashes of the shingles of a document, in order, with repetitions.

    A document of fewer letters than a shingle has one hash, of its whole text with punctuation and inner white space, because a
    few letters alone are easily the same by chance.
    """
    found = letters(text)
    if len(found) < WINDOW:
        whole = _numbers("\n".join(_one_form(text).strip().splitlines()))
        places = _mix(np.arange(len(whole), dtype=np.uint64) + np.uint64(1))
        return _mix(np.array([(_mix(whole.astype(np.uint64)) * places).sum()], dtype=np.uint64))
    # The hash of a window is made of those of its halves.
    total, width = _mix(found.astype(np.uint64)), 1
    while width < WINDOW:
        total = total[:-width] * _SEEDS[width.bit_length()] + total[width:]
        width *= 2
    return _mix(total)


def sketch(hashes: Hashes) -> Sketch:
    """Return the sketch of a document, given its `shingles`."""
    # To sort all hashes of a long document would take longer than to compute them.
    small = np.unique(hashes[hashes <= _FLOOR])
    if len(small) >= KEPT:
        return Sketch(small, _FLOOR)
    found = np.unique(hashes)
    return Sketch(found[:KEPT], _ALL if len(found) <= KEPT else found[KEPT - 1])


def signature(hashes: Hashes) -> Hashes:
    """Compute the MinHash signature (BINS,) of a document: the smallest hash of each bin.

    An empty bin takes the hash of another bin. Which bins it tries is the same for every document.

    Args:
        hashes: The `shingles` of the document.
    """
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


def jaccard(first: Sketch, second: Sketch) -> float:
    """Estimate the Jaccard similarity of two documents: size of the intersection of their shingles over size of the union.

    It is exact for documents whose sketches have all hashes. The standard error of others is at most 0.03.
    """
    limit = min(first.limit, second.limit)
    one, other = (each.hashes[: np.searchsorted(each.hashes, limit, side="right")] for each in (first, second))
    both = np.concatenate((one, other))
    both.sort(kind="stable")  # detects the two sorted runs and merges them
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    union = len(both) - common
    return common / union if union else 1.0


def group_documents(signatures: Hashes, sketch_of: Callable[[int], Sketch]) -> NDArray[np.int64]:
    """Group near-duplicate documents. Near-duplicates of near-duplicates are in the same group.

    Args:
        signatures: (D, BINS) signatures of the documents.
        sketch_of: Returns the sketch of a document, given by its number.

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
    read = lru_cache(maxsize=_CACHED)(sketch_of)
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


def _one_form(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).removeprefix("\ufeff")


def _numbers(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def _mix(values: Hashes) -> Hashes:
    """Apply the finalizer of splitmix64, in which every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
