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
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

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
_CACHED = 1 << 25
"""Hashes of sketches that are kept in memory, 256 MiB."""
_BLOCK = 1 << 14
"""Signatures that are read at a time."""

_ATTEMPTS = 128
EMPTY = np.uint64(2**64 - 1)
"""No hash, in a bin."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
ALL = np.uint64(2**64 - 1)
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
    return _numbers(_NOT_LETTERS.sub("", one_form(text)))


def shingles(text: str) -> Hashes:
    """Compute the hashes of the shingles of a document, in order, with repetitions.

    A document of fewer letters than a shingle has one hash, of its whole text with punctuation, because a few letters alone are
    easily the same by chance. Each white space in it counts as one space.
    """
    found = letters(text)
    if len(found) < WINDOW:
        return mix(sum_of_characters(" ".join(one_form(text).removeprefix("\ufeff").split()), 0))
    return windows(found)


def sum_of_characters(text: str, start: int) -> Hashes:
    """Return the sum (1,) of the hashes of characters with their places. The sums of the parts of a text add up to its sum.

    Args:
        text: A part of a text.
        start: The number of characters before it.
    """
    places = mix(np.arange(start + 1, start + len(text) + 1, dtype=np.uint64))
    total: Hashes = (mix(_numbers(text).astype(np.uint64)) * places).sum(keepdims=True)
    return total


def windows(found: NDArray[np.uint32]) -> Hashes:
    """Compute the hashes of the shingles of `letters`, in order. None if there are fewer letters than a shingle has."""
    if len(found) < WINDOW:
        return np.zeros(0, dtype=np.uint64)
    # The hash of a window is made of those of its halves.
    total, width = mix(found.astype(np.uint64)), 1
    while width < WINDOW:
        total = total[:-width] * _SEEDS[width.bit_length()] + total[width:]
        width *= 2
    return mix(total)


def sketch(hashes: Hashes) -> Sketch:
    """Return the sketch of a document, given its `shingles`, or of a part of it."""
    # To sort all hashes of a long document would take longer than to compute them.
    small = hashes[hashes <= _FLOOR]
    if len(small) >= KEPT:
        small.sort()  # in place, because the hashes of a text in one line can be 100 MB
        small = small[np.append(True, small[1:] != small[:-1])]
    if len(small) >= KEPT:
        return Sketch(small, _FLOOR)
    found = np.unique(hashes)
    return Sketch(found[:KEPT], ALL if len(found) <= KEPT else found[KEPT - 1])


def signature(hashes: Hashes) -> Hashes:
    """Compute the MinHash signature (BINS,) of a document: the smallest hash of each bin.

    An empty bin takes the hash of another bin. Which bins it tries is the same for every document.

    Args:
        hashes: The `shingles` of the document.
    """
    return fill(smallest(hashes))


def smallest(hashes: Hashes) -> Hashes:
    """Return the smallest hash of each bin (BINS,), `EMPTY` where there is none."""
    bins = np.full(BINS, EMPTY)
    np.minimum.at(bins, (hashes % np.uint64(BINS)).astype(np.int64), hashes)
    return bins


def fill(bins: Hashes) -> Hashes:
    """Return bins of which no empty one is left; see `signature`."""
    filled = bins != EMPTY
    empty, full, block = np.flatnonzero(~filled), bins.copy(), 0
    while len(empty) and filled.any():
        hit = filled[_donor_bins(block)[:, empty]]  # (attempts, empty)
        first = hit.argmax(axis=0)
        donated = hit[first, np.arange(len(empty))]
        receiver, attempt = empty[donated], first[donated]
        full[receiver] = mix(bins[_donor_bins(block)[attempt, receiver]] + (block * _ATTEMPTS + attempt + 1).astype(np.uint64))
        empty, block = empty[~donated], block + 1
    return full


@lru_cache(maxsize=64)
def _donor_bins(block: int) -> NDArray[np.int64]:
    """Return the bins (attempts, BINS) that each empty bin tries in turn. The first that is not empty provides the hash."""
    attempts = np.arange(block * _ATTEMPTS + 1, (block + 1) * _ATTEMPTS + 1, dtype=np.uint64)[:, None]
    return (mix(np.arange(BINS, dtype=np.uint64) * np.uint64(1_000_003) + attempts) % np.uint64(BINS)).astype(np.int64)


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
    parent[:] = first = _first_equal(signatures)
    read = _Cache(sketch_of)
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


def _may_be_similar(first: Hashes, second: Hashes) -> bool:
    """Whether two documents can be near-duplicates by their signatures. Near-duplicates agree on about 0.8 of the bins."""
    return int(np.count_nonzero(first == second)) > 0.3 * BINS


class _Cache:
    """The sketches that were read last, as many as fit into `_CACHED`."""

    def __init__(self, read: Callable[[int], Sketch]) -> None:
        self._read, self._size = read, 0
        self._sets: OrderedDict[int, Sketch] = OrderedDict()

    def __call__(self, document: int) -> Sketch:
        if document in self._sets:
            self._sets.move_to_end(document)
            return self._sets[document]
        found = self._read(document)
        self._sets[document] = found
        self._size += len(found.hashes)
        while self._size > _CACHED and len(self._sets) > 1:
            self._size -= len(self._sets.popitem(last=False)[1].hashes)
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
        total = mix(total * _MULTIPLIER + values[..., column])
    return total


def one_form(text: str) -> str:
    """Return a text in one Unicode form (NFKC) and without case."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _numbers(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def mix(values: Hashes) -> Hashes:
    """Apply the finalizer of splitmix64, in which every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
