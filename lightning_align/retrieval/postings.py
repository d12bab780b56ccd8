"""BM25 on disk: which terms each chunk has, and which chunks each term has. It is built and searched in bounded memory.

The score of a chunk for a query is the sum over the distinct terms of the query of

    idf · tf / (tf + k1 · (1 - b + b · length / mean length)),   idf = ln(1 + (C - df + 0.5) / (df + 0.5))

(Robertson and Zaragoza 2009, with the idf of Lucene, which is never negative). C is the number of chunks, df the number of
chunks with the term, tf how often a chunk has it, and length the number of terms of a chunk.

A search adds up only as many lists as it needs (MaxScore, Turtle and Flood 1995). The list of a term is cut into tiers of
falling weight, so that the weight of what was left out is known closely. Once it is below the k-th best score that was found,
no other chunk can be among the k best. The chunks that can be are scored exactly, in float64, from their own terms.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_align.retrieval.stages import write_rows
from lightning_align.retrieval.tables import Bools, Ints

Doubles = NDArray[np.float64]

K1, B = 1.5, 0.75
TIERS = 8
"""Parts of the list of a term, of falling weight. They have about the same number of postings over all terms."""
FILES = ("terms", "counts", "starts", "lengths", "frequencies", "chunks", "weights", "tiers", "edges")
_BLOCK = 8192
"""Chunks whose terms are counted at a time."""
_PART = 1 << 21
"""Postings that are read at a time."""
_SORTED = 1 << 22
"""Postings that are sorted at a time."""
_FIRST = 2048
"""Postings after which a search estimates the k-th best score."""
_CALL = 24.0
"""Postings that take as long as the work to begin a list."""
_MANY = 512
"""Candidates above which a search raises the bar first."""
_SHARE = 0.5
"""A search adds up lists until what is left out is below this share of the k-th best score. Then few chunks remain."""

_WORTH = 5
"""With more postings than a fifth of the chunks, it is faster to look at the scores of all chunks than to gather some."""
_WIDTH = 64
"""Chunks per block of scores."""


class Span(NamedTuple):
    """The terms of a number of chunks."""

    terms: NDArray[np.int32]
    """(P,) numbers of the distinct terms of each chunk, ascending, chunk by chunk."""
    counts: NDArray[np.int32]
    """(P,) how often the chunk has the term."""
    widths: Ints
    """(n,) distinct terms per chunk."""
    lengths: NDArray[np.int32]
    """(n,) terms per chunk."""


def count_terms(chunks: Iterable[Sequence[int]]) -> Iterator[Span]:
    """Count the terms of chunks, a block of chunks at a time.

    Args:
        chunks: The numbers of the terms of each chunk, in order, with repetitions.
    """
    block: list[Sequence[int]] = []
    for chunk in chunks:
        block.append(chunk)
        if len(block) == _BLOCK:
            yield _count(block)
            block = []
    if block:
        yield _count(block)


def _count(block: Sequence[Sequence[int]]) -> Span:
    lengths = np.array([len(chunk) for chunk in block], dtype=np.int32)
    flat = np.array([term for chunk in block for term in chunk], dtype=np.int64)
    keys = np.repeat(np.arange(len(block)) << 40, lengths) | flat
    keys, counts = np.unique(keys, return_counts=True)
    widths = np.bincount(keys >> 40, minlength=len(block))
    return Span((keys & ((1 << 40) - 1)).astype(np.int32), counts.astype(np.int32), widths, lengths)


def write_postings(folder: Path, spans: Iterable[Span]) -> int:
    """Write the files of an index.

    Args:
        folder: The folder to write to.
        spans: The terms of all chunks in order, see `count_terms`. The numbers of terms are 0, 1, ... without gaps.

    Returns:
        The number of distinct terms. If it is 0, nothing is complete.

    Raises:
        ValueError: If the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = {name: folder / f".{name}.tmp" for name in ("terms", "counts")}
    widths, lengths, frequencies = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int32)], np.zeros(0, dtype=np.int64)
    try:
        with raw["terms"].open("wb") as terms, raw["counts"].open("wb") as counts:
            for span in spans:
                terms.write(span.terms.data.cast("B") if len(span.terms) else b"")
                counts.write(span.counts.data.cast("B") if len(span.counts) else b"")
                widths.append(span.widths)
                lengths.append(span.lengths)
                found = np.bincount(span.terms, minlength=len(frequencies))
                found[: len(frequencies)] += frequencies
                frequencies = found
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror or error}). Free disk space.") from error
    starts, length = np.cumsum(np.concatenate(widths)), np.concatenate(lengths)
    if not len(frequencies):
        return 0
    num = int(starts[-1])
    for name, path in raw.items():
        parts = (np.fromfile(path, dtype=np.int32, count=_PART, offset=4 * at) for at in range(0, num, _PART))
        write_rows(folder / f"{name}.npy", parts, dtype=np.int32, shape=(num,))
        path.unlink()
    for name, values in (("starts", starts), ("lengths", length), ("frequencies", frequencies)):
        write_rows(folder / f"{name}.npy", [values], dtype=values.dtype, shape=values.shape)
    _invert(folder, starts, length, frequencies)
    return len(frequencies)


def _invert(folder: Path, starts: Ints, lengths: NDArray[np.int32], frequencies: Ints) -> None:
    """Write the chunks of each term, from the terms of each chunk."""
    mean, num = float(lengths.mean()), int(starts[-1])

    def parts(first: int = 0, last: int | None = None) -> Iterator[tuple[Ints, NDArray[np.int32], Doubles]]:
        """Yield the chunks, the terms from first to last, and tf / (tf + ...), in parts."""
        terms, counts = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("terms", "counts"))
        for at in range(0, num, _PART):
            some = np.asarray(terms[at : at + _PART])
            low, high = np.searchsorted(starts, (at, at + len(some)), side="right")
            inner = np.clip(starts[low - 1 : high + 1], at, at + len(some))
            chunks = np.repeat(np.arange(low - 1, low - 1 + len(inner) - 1), np.diff(inner))
            tf = np.asarray(counts[at : at + _PART])
            if last is not None:
                kept = np.flatnonzero((some >= first) & (some < last))
                some, chunks, tf = some[kept], chunks[kept], tf[kept]
            yield chunks, some, saturation(tf, lengths[chunks], mean)

    histogram = np.zeros(1 << 12, dtype=np.int64)
    for _, _, share in parts():
        histogram += np.bincount((share * len(histogram)).astype(np.int64), minlength=len(histogram))
    # Tiers are bounded by values that as many postings lie between.
    wanted = num * np.arange(1, TIERS) / TIERS
    inner = (np.searchsorted(np.cumsum(histogram), wanted, side="left") + 1) / len(histogram)
    edges = np.concatenate([[0.0], inner, [1.0]])[::-1]
    ends = np.concatenate([[0], np.cumsum(frequencies)])
    sizes = np.zeros((len(frequencies), TIERS), dtype=np.int32)
    # Terms whose lists are sorted together: as many as have _SORTED postings, at least one.
    cuts = [0]
    while cuts[-1] < len(frequencies):
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, ends[cuts[-1]] + _SORTED, side="right")) - 1))

    def lists() -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        for first, last in pairwise(cuts):
            found = [(c.astype(np.int32), t, s.astype(np.float32), _tier(s, edges)) for c, t, s in parts(first, last)]
            chunks, terms, share, tier = (np.concatenate(column) for column in zip(*found, strict=True))
            del found
            keys = (terms - np.int32(first)).astype(np.int64) * TIERS + tier
            sizes[first:last] = np.bincount(keys, minlength=(last - first) * TIERS).reshape(-1, TIERS)
            order = np.argsort(keys, kind="stable")
            idf = inverse_frequency(frequencies[terms], len(lengths))
            yield chunks[order], (idf * share)[order].astype(np.float32)

    # Two files in one pass: weights go to a raw file first.
    raw = folder / ".weights.tmp"
    with raw.open("wb") as weights:

        def chunk_lists() -> Iterator[NDArray[np.int32]]:
            for chunks, some in lists():
                weights.write(some.data.cast("B"))
                yield chunks

        write_rows(folder / "chunks.npy", chunk_lists(), dtype=np.int32, shape=(num,))
    floats = (np.fromfile(raw, dtype=np.float32, count=_PART, offset=4 * at) for at in range(0, num, _PART))
    write_rows(folder / "weights.npy", floats, dtype=np.float32, shape=(num,))
    raw.unlink()
    begins = ends[:-1, None]
    tiers = (
        begins[at : at + _BLOCK] + np.pad(np.cumsum(sizes[at : at + _BLOCK], axis=1, dtype=np.int64), ((0, 0), (1, 0)))
        for at in range(0, len(sizes), _BLOCK)
    )
    write_rows(folder / "tiers.npy", tiers, dtype=np.int64, shape=(len(sizes), TIERS + 1))
    write_rows(folder / "edges.npy", [edges], dtype=np.float64, shape=edges.shape)


def _tier(share: Doubles, edges: Doubles) -> NDArray[np.int8]:
    """Return the tier of each posting: tier j has shares above edges[j + 1] and up to edges[j]."""
    return (TIERS - np.searchsorted(edges[::-1][1:-1], share, side="left") - 1).astype(np.int8)


def saturation(tf: NDArray[Any], lengths: NDArray[Any], mean: float) -> Doubles:
    """Compute tf / (tf + k1 · (1 - b + b · length / mean)), from 0 to 1."""
    result: Doubles = tf / (tf + K1 * (1 - B + B * lengths / mean))
    return result


def inverse_frequency(frequencies: NDArray[Any], num_chunks: int) -> Doubles:
    """Compute ln(1 + (C - df + 0.5) / (df + 0.5))."""
    result: Doubles = np.log(1 + (num_chunks - frequencies + 0.5) / (frequencies + 0.5))
    return result


class Postings:
    """Searches an index that `write_postings` wrote.

    Args:
        folder: Its folder.
        groups: (C,) group of each chunk's document. Chunks with a negative group are never found.
    """

    def __init__(self, folder: Path, groups: Ints) -> None:
        # Torch takes no arrays that are read-only. Nothing writes to them.
        arrays: dict[str, Any] = {name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in FILES}
        # Views as plain arrays: each access to a memory map would create an object of its class.
        self._terms, self._counts, self._starts, self._lengths = (
            np.asarray(arrays[name]) for name in ("terms", "counts", "starts", "lengths")
        )
        self._chunks, self._weights, self._tiers, edges = (
            np.asarray(arrays[name]) for name in ("chunks", "weights", "tiers", "edges")
        )
        self.num_chunks = len(self._lengths)
        self.idf = inverse_frequency(np.asarray(arrays["frequencies"]), self.num_chunks)
        self.groups, self._mean = groups, float(self._lengths.mean())
        self._edges, self._drops = edges, edges[:-1] - edges[1:]
        self._query_idf = np.zeros(len(self.idf))
        self._lists = torch.from_numpy(self._chunks), torch.from_numpy(self._weights)
        self._scores = torch.zeros(self.num_chunks, dtype=torch.float32)  # bf16-true changes the default
        self._last = np.zeros(self.num_chunks, dtype=np.int32)

    def scores(self, query: Sequence[int], chunks: Ints) -> Doubles:
        """Compute the scores (n,) of chunks (n,) for the distinct terms of a query."""
        starts = self._starts[chunks]
        widths = self._starts[chunks + 1] - starts
        ends = np.cumsum(widths)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - widths), widths)
        terms = np.asarray(query, dtype=np.int64)
        self._query_idf[terms] = self.idf[terms]
        idf = self._query_idf[self._terms[places]]
        self._query_idf[terms] = 0
        parts = idf * saturation(self._counts[places], np.repeat(self._lengths[chunks], widths), self._mean)
        result, some = np.zeros(len(chunks)), np.flatnonzero(widths)
        if len(some):
            result[some] = np.add.reduceat(parts, (ends - widths)[some])
        return result

    def best(self, query: Sequence[int], k: int, forbidden: Sequence[int]) -> tuple[Ints, Doubles]:
        """Find the k chunks of the highest scores above 0, or fewer. Of equal scores, the lowest numbers come first.

        Args:
            query: Distinct terms.
            k: The number of chunks to find.
            forbidden: Groups whose chunks must not be found.

        Returns:
            The chunks and their scores, highest first.
        """
        if not len(query) or k < 1:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        terms = np.asarray(query, dtype=np.int64)
        tiers = self._tiers[terms]  # (t, TIERS + 1)
        sizes = np.diff(tiers, axis=1)
        gains = self.idf[terms][:, None] * self._drops
        # The tiers that lower the bound of the rest most per posting come first. Tiers of a term stay in order.
        worth = np.minimum.accumulate(gains / (sizes + _CALL * (sizes > 0) + 1e-9), axis=1).reshape(-1)
        order = np.argsort(-worth, kind="stable")
        touched = np.cumsum(sizes.reshape(-1)[order])
        # The bound of what is left out once each tier was added.
        rest = np.append(np.cumsum(gains.reshape(-1)[order][:0:-1])[::-1], 0.0)
        slack = 1e-5 * float(gains.sum())  # sums of float32 weights round
        taken = np.zeros(len(terms), dtype=np.int64)
        first = min(int(np.searchsorted(touched, _FIRST)) + 1, len(order))
        some, taken = self._add(order[:first], tiers, taken)
        bar = 0.0
        if len(some):
            scores = self._allowed_scores(some, forbidden)
            promising = some[_top(scores, 4 * k)]
            exact = self._exact(query, promising, forbidden)[1]
            bar = float(exact[k - 1]) if len(exact) >= k else 0.0
        last = len(order) if bar <= 0 else int(np.searchsorted(-rest, -_SHARE * bar, side="left")) + 1
        left = float(rest[max(first, last) - 1]) + slack
        if touched[max(first, last) - 1] > self.num_chunks / _WORTH:
            return self._best_of_all(query, k, forbidden, self._spans(order[first:last], tiers, taken)[0], bar, left)
        more, taken = self._add(order[first:last], tiers, taken)
        both = np.concatenate([some, more])
        scores = self._gather(both)
        near = np.flatnonzero(scores >= bar - left)
        if len(near) > _MANY:
            # Those with the highest scores so far raise the bar for the others.
            exact = self._exact(query, both[near[_top(scores[near], _MANY // 4)]], forbidden)[1]
            bar = max(bar, float(exact[k - 1]) if len(exact) >= k else 0.0)
            near = near[scores[near] >= bar - left]
        result = self._exact(query, both[near], forbidden)
        self._scores.numpy()[both] = 0
        return result[0][:k], result[1][:k]

    def _best_of_all(
        self, query: Sequence[int], k: int, forbidden: Sequence[int], spans: list[slice], bar: float, left: float
    ) -> tuple[Ints, Doubles]:
        """Add the last lists, and look at the scores of all chunks. See `best`.

        Args:
            query: Distinct terms.
            k: The number of chunks to find.
            forbidden: Groups whose chunks must not be found.
            spans: The postings to add.
            bar: A bound that the k-th best score is not below.
            left: The most that a score can rise, because of what is left out and of rounding.
        """
        chunks, weights = self._lists
        for span in spans:
            self._scores.index_add_(0, chunks[span], weights[span])
        whole = self.num_chunks - self.num_chunks % _WIDTH
        highest, places = self._scores[:whole].view(-1, _WIDTH).max(dim=1)
        best = (places + torch.arange(0, whole, _WIDTH)).numpy()
        count = 4 * k
        while len(best):
            # The best chunks of the best blocks are scored exactly, to raise the bar.
            exact = self._exact(query, best[_top(highest.numpy(), count)], forbidden)[1]
            if len(exact) >= k or count >= len(best):
                bar = max(bar, float(exact[k - 1]) if len(exact) >= k else 0.0)
                break
            count *= 8
        scores = self._scores.numpy()
        # Where fewer than k were found, all lists were added, and what has no score has no term.
        near = np.flatnonzero(scores >= bar - left if bar > left else scores > 0)
        self._scores.zero_()
        result = self._exact(query, near, forbidden)
        return result[0][:k], result[1][:k]

    def _add(self, tiers: Ints, bounds: Ints, taken: Ints) -> tuple[Ints, Ints]:
        """Add the weights of tiers to the scores. Return their chunks, with repetitions, and the tiers taken per term."""
        spans, now = self._spans(tiers, bounds, taken)
        if not spans:
            return np.zeros(0, dtype=np.int64), now
        chunks = np.concatenate([self._chunks[span] for span in spans], dtype=np.int64)
        weights = np.concatenate([self._weights[span] for span in spans])
        self._scores.scatter_add_(0, torch.from_numpy(chunks), torch.from_numpy(weights))
        return chunks, now

    @staticmethod
    def _spans(tiers: Ints, bounds: Ints, taken: Ints) -> tuple[list[slice], Ints]:
        """Return the postings of tiers, and the tiers taken per term."""
        now = taken + np.bincount(tiers // TIERS, minlength=len(taken))
        rows = np.flatnonzero(now > taken)
        starts, stops = bounds[rows, taken[rows]].tolist(), bounds[rows, now[rows]].tolist()
        return [slice(a, b) for a, b in zip(starts, stops, strict=True) if a < b], now

    def _gather(self, chunks: Ints) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._scores.index_select(0, torch.from_numpy(chunks)).numpy()
        return found

    def _allowed_scores(self, chunks: Ints, forbidden: Sequence[int]) -> NDArray[np.float32]:
        """Return the score of each chunk so far: 0 if it must not be found, or at all but one place if it is repeated."""
        scores = np.where(self._allowed(chunks, forbidden), self._gather(chunks), 0)
        places = np.arange(len(chunks), dtype=np.int32)
        self._last[chunks] = places
        scores[self._last[chunks] != places] = 0
        return scores

    def _allowed(self, chunks: Ints, forbidden: Sequence[int]) -> Bools:
        groups = self.groups[chunks]
        allowed: Bools = groups >= 0
        for group in forbidden:
            allowed &= groups != group
        return allowed

    def _exact(self, query: Sequence[int], chunks: Ints, forbidden: Sequence[int]) -> tuple[Ints, Doubles]:
        """Return the distinct allowed chunks that have a term, and their scores, highest first."""
        some = np.unique(chunks)
        some = some[self._allowed(some, forbidden)]
        scores = self.scores(query, some)
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > 0]
        return some[order], scores[order]


def _top(scores: NDArray[np.float32], count: int) -> Ints:
    """Return the indices of the `count` largest scores, in any order, or all."""
    return np.arange(len(scores)) if len(scores) <= count else np.argpartition(scores, -count)[-count:]
