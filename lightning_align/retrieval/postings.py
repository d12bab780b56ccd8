"""BM25 on disk: which terms each chunk has, and which chunks each term has. It is searched in bounded memory.

The score of a chunk for a query is the sum over the distinct terms of the query of

    idf · tf / (tf + k1 · (1 - b + b · length / mean length)),   idf = ln(1 + (C - df + 0.5) / (df + 0.5))

(Robertson and Zaragoza 2009, with the idf of Lucene, which is never negative). C is the number of chunks, df the number of
chunks with the term, tf how often a chunk has it, and length the number of terms of a chunk.

A search adds up short lists whole. Of long ones it adds up only as many as it needs (MaxScore, Turtle and Flood 1995). The
list of a term is cut into tiers of falling weight, so that the weight of what was left out is known closely. Once it is below
the k-th best score that was found, no other chunk can be among the k best. The chunks that can be are scored exactly, in
float64, from their own terms.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_align.retrieval.inversion import (
    FILES,
    TIERS,
    Doubles,
    hash_terms,
    inverse_frequency,
    saturation,
)
from lightning_align.retrieval.tables import Bools, Ints
from lightning_align.runtime.mapped import release_pages

_FIRST = 2048
"""Postings after which a search estimates the k-th best score."""
_CALL = 24.0
"""Postings that take as long as the work to begin a list."""
_MANY = 512
"""Candidates above which a search raises the bar first."""
_WHOLE = 800_000
"""Up to so many postings it is faster to add up all of them than to choose among them."""
_SHARE = 0.5
"""A search adds up lists until what is left out is below this share of the k-th best score. Then few chunks remain."""

_WORTH = 5
"""With more postings than a fifth of the chunks, it is faster to look at the scores of all chunks than to gather some."""
_WIDTH = 64
"""Chunks per block of scores."""
_LEAST = float(np.finfo(np.float32).tiny)
"""A score that is not 0."""
_ROUNDING = 1e-5
"""How far a sum of float32 weights can be off, as a share of the highest score."""

_RETURNED = 1 << 21
"""Postings after which pages of files are returned to the system, if they are many: 16 MiB of lists."""
_SCORED = 3 * (1 << 16) // 8
"""Postings that take as many pages as the terms of a chunk. The system maps 64 KiB around each place of a file that is read."""
_TOGETHER = 512
"""Chunks whose terms are read before pages may be returned."""


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
        self._hashes, self._frequencies = np.asarray(arrays["hashes"]), np.asarray(arrays["frequencies"])
        self.num_chunks = len(self._lengths)
        self.groups, self._mean = groups, float(self._lengths.mean())
        self._edges, self._drops = edges, edges[:-1] - edges[1:]
        self._query_idf = np.zeros(len(self._hashes))
        self._lists = torch.from_numpy(self._chunks), torch.from_numpy(self._weights)
        # Whole blocks. The places after the last chunk stay 0. bf16-true changes the default type.
        self._scores = torch.zeros(-(-self.num_chunks // _WIDTH) * _WIDTH, dtype=torch.float32)
        self._last = np.zeros(self.num_chunks, dtype=np.int32)
        self._folder, self._read = folder, 0

    def _reads(self, postings: int) -> None:
        """Count what is read next. In a large corpus a single query reads a hundred megabytes of mapped files."""
        self._read += postings
        if self._read >= _RETURNED:
            release_pages(self._folder)
            self._read = postings

    def numbers(self, terms: Iterable[str]) -> list[int]:
        """Return the distinct numbers of terms, ascending. Terms that no chunk has are dropped."""
        hashes = np.unique(hash_terms(list(terms)))
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found: list[int] = places[self._hashes[places] == hashes].tolist()
        return found

    def _idf(self, terms: Ints) -> Doubles:
        return inverse_frequency(self._frequencies[terms], self.num_chunks)

    def scores(self, query: Sequence[int], chunks: Ints) -> Doubles:
        """Compute the scores (n,) of chunks (n,) for the distinct terms of a query."""
        if len(chunks) > _TOGETHER:
            parts = [self.scores(query, chunks[start : start + _TOGETHER]) for start in range(0, len(chunks), _TOGETHER)]
            return np.concatenate(parts)
        self._reads(len(chunks) * _SCORED)
        starts = self._starts[chunks]
        widths = self._starts[chunks + 1] - starts
        ends = np.cumsum(widths)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - widths), widths)
        terms = np.asarray(query, dtype=np.int64)
        self._query_idf[terms] = self._idf(terms)
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
        size = int((tiers[:, -1] - tiers[:, 0]).sum())
        if size <= _WHOLE:
            spans = [slice(start, stop) for start, stop in tiers[:, [0, -1]].tolist()]
            return self._best_of_all(query, k, forbidden, spans, 0.0, 0.0, _ROUNDING * float(self._idf(terms).sum()))
        sizes = np.diff(tiers, axis=1)
        gains = self._idf(terms)[:, None] * self._drops
        # The tiers that lower the bound of the rest most per posting come first. Tiers of a term stay in order.
        worth = np.minimum.accumulate(gains / (sizes + _CALL * (sizes > 0) + 1e-9), axis=1).reshape(-1)
        order = np.argsort(-worth, kind="stable")
        touched = np.cumsum(sizes.reshape(-1)[order])
        # The bound of what is left out once each tier was added.
        rest = np.append(np.cumsum(gains.reshape(-1)[order][:0:-1])[::-1], 0.0)
        slack = _ROUNDING * float(gains.sum())
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
        left = float(rest[max(first, last) - 1])
        if touched[max(first, last) - 1] > self.num_chunks / _WORTH:
            return self._best_of_all(query, k, forbidden, self._spans(order[first:last], tiers, taken)[0], bar, left, slack)
        left += slack
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
        self, query: Sequence[int], k: int, forbidden: Sequence[int], spans: list[slice], bar: float, left: float, slack: float
    ) -> tuple[Ints, Doubles]:
        """Add the last lists, and look at the scores of all chunks. See `best`.

        Args:
            query: Distinct terms.
            k: The number of chunks to find.
            forbidden: Groups whose chunks must not be found.
            spans: The postings to add.
            bar: A bound that the k-th best score is not below.
            left: The most that a score can rise, because of what is left out.
            slack: How far a score can be off, because of rounding.
        """
        chunks, weights = self._lists
        for span in spans:
            for start in range(span.start, span.stop, _RETURNED):
                part = slice(start, min(start + _RETURNED, span.stop))
                self._reads(part.stop - part.start)
                self._scores.index_add_(0, chunks[part], weights[part])
        highest = self._scores.view(-1, _WIDTH).amax(dim=1).numpy()
        count, least = 4 * k, _LEAST
        while True:
            # The best blocks have k good chunks, which raise the bar for all others.
            some, scores = self._above(_top(highest, count), least, forbidden)
            if len(some) >= k or count >= len(highest):
                break
            count *= 8
        if len(some) >= k:
            if left:
                bar = max(bar, float(self._exact(query, some[_top(scores, 4 * k)], forbidden)[1][k - 1]))
            else:
                bar = max(bar, _kth(scores, k) - slack)
            # Where fewer than k were found, all lists were added, and what has no score has no term.
            least = max(least, bar - left - slack)
            some, scores = self._above(np.flatnonzero(highest >= least), least, forbidden)
            if not left:
                some = some[scores >= _kth(scores, k) - 2 * slack]
        self._scores.zero_()
        result = self._exact(query, some, forbidden)
        return result[0][:k], result[1][:k]

    def _above(self, blocks: Ints, least: float, forbidden: Sequence[int]) -> tuple[Ints, NDArray[np.float32]]:
        """Return the allowed chunks of blocks whose score is not below a bound, and their scores."""
        scores = self._scores.numpy().reshape(-1, _WIDTH)[blocks]
        rows, places = np.nonzero(scores >= least)
        chunks = blocks[rows] * _WIDTH + places
        allowed = self._allowed(chunks, forbidden)
        return chunks[allowed], scores[rows[allowed], places[allowed]]

    def _add(self, tiers: Ints, bounds: Ints, taken: Ints) -> tuple[Ints, Ints]:
        """Add the weights of tiers to the scores. Return their chunks, with repetitions, and the tiers taken per term."""
        spans, now = self._spans(tiers, bounds, taken)
        if not spans:
            return np.zeros(0, dtype=np.int64), now
        self._reads(sum(span.stop - span.start for span in spans))
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


def _kth(scores: NDArray[np.float32], k: int) -> float:
    """Return the k-th largest score."""
    return float(np.partition(scores, -k)[-k])
