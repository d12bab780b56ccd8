"""Writes the files of `Postings`: the terms of each chunk, and the chunks of each term. Memory does not grow with the postings.

A term is known by a hash of 64 bits, so no list of words is held or stored. The number of a term is the place of its hash
among all hashes. What is held grows by 16 bytes per distinct term and by 12 bytes per chunk. Postings are written chunk by
chunk first. Then they are divided by their term into files that are small enough to be sorted.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align.retrieval.stages import write_rows
from lightning_align.retrieval.tables import Ints

Doubles = NDArray[np.float64]
Hashes = NDArray[np.uint64]

K1, B = 1.5, 0.75
TIERS = 8
"""Parts of the list of a term, of falling weight. They have about the same number of postings over all terms."""
FILES = ("hashes", "terms", "counts", "starts", "lengths", "frequencies", "chunks", "weights", "tiers", "edges")
_BLOCK = 8192
"""Chunks whose terms are counted at a time."""
_PART = 1 << 20
"""Postings that are read at a time."""
_SORTED = 1 << 20
"""Postings that are sorted at a time."""


class Span(NamedTuple):
    """The terms of a number of chunks."""

    hashes: Hashes
    """(P,) hashes of the distinct terms of each chunk, ascending, chunk by chunk."""
    counts: NDArray[np.int32]
    """(P,) how often the chunk has the term."""
    widths: Ints
    """(n,) distinct terms per chunk."""
    lengths: NDArray[np.int32]
    """(n,) terms per chunk."""


def hash_terms(terms: Sequence[str]) -> Hashes:
    """Return the hash (n,) of each term."""
    digests = (hashlib.blake2b(term.encode("utf-8", errors="surrogatepass"), digest_size=8).digest() for term in terms)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def count_terms(chunks: Iterable[Sequence[str]]) -> Iterator[Span]:
    """Count the terms of chunks, a block of chunks at a time.

    Args:
        chunks: The terms of each chunk, in order, with repetitions.
    """
    block: list[Sequence[str]] = []
    for chunk in chunks:
        block.append(chunk)
        if len(block) == _BLOCK:
            yield _count(block)
            block = []
    if block:
        yield _count(block)


def _count(block: Sequence[Sequence[str]]) -> Span:
    lengths = np.array([len(chunk) for chunk in block], dtype=np.int32)
    known: dict[str, int] = {}
    flat = np.array([known.setdefault(term, len(known)) for chunk in block for term in chunk], dtype=np.int64)
    hashes, places = np.unique(hash_terms(list(known)), return_inverse=True)
    keys = np.repeat(np.arange(len(block)) << 32, lengths) | places.astype(np.int64)[flat]
    keys, counts = np.unique(keys, return_counts=True)
    widths = np.bincount(keys >> 32, minlength=len(block))
    return Span(hashes[keys & ((1 << 32) - 1)], counts.astype(np.int32), widths, lengths)


def write_postings(folder: Path, spans: Iterable[Span]) -> int:
    """Write the files of an index.

    Args:
        folder: The folder to write to.
        spans: The terms of all chunks in order, see `count_terms`.

    Returns:
        The number of distinct terms. If it is 0, nothing is complete.

    Raises:
        ValueError: If the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _remove_leftovers(folder)
        starts, lengths, hashes = _write_raw(folder, spans)
        if not len(hashes):
            return 0
        _Inversion(folder, starts, lengths, hashes).write()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror or error}). Free disk space.") from error
    finally:
        with suppress(OSError):
            _remove_leftovers(folder)
    return len(hashes)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".raw-*.tmp"):
        path.unlink(missing_ok=True)


def _raw(folder: Path, name: str) -> Path:
    return folder / f".raw-{name}.tmp"


def _write_raw(folder: Path, spans: Iterable[Span]) -> tuple[Ints, NDArray[np.int32], Hashes]:
    """Write the postings chunk by chunk. Return where each chunk starts, its number of terms, and all hashes, ascending."""
    widths, lengths = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int32)]
    known, new, num_new = np.zeros(0, dtype=np.uint64), [np.zeros(0, dtype=np.uint64)], 0
    with _raw(folder, "hashes").open("wb") as hashes, _raw(folder, "counts").open("wb") as counts:
        for span in spans:
            _append(hashes, span.hashes)
            _append(counts, span.counts)
            widths.append(span.widths)
            lengths.append(span.lengths)
            new.append(np.unique(span.hashes))
            num_new += len(new[-1])
            if num_new > max(_PART, len(known)):  # as many as before: the sorting adds up to little
                known, new, num_new = np.unique(np.concatenate([known, *new])), [], 0
    return np.cumsum(np.concatenate(widths)), np.concatenate(lengths), np.unique(np.concatenate([known, *new]))


class _Inversion:
    """Writes the chunks of each term, from the terms of each chunk."""

    def __init__(self, folder: Path, starts: Ints, lengths: NDArray[np.int32], hashes: Hashes) -> None:
        self.folder, self.starts, self.lengths, self.hashes = folder, starts, lengths, hashes
        self.num, self.mean = int(starts[-1]), float(lengths.mean())
        self.frequencies = np.zeros(len(hashes), dtype=np.int64)

    def write(self) -> None:
        """Write all files."""
        rows: dict[str, NDArray[Any]] = {"hashes": self.hashes, "starts": self.starts, "lengths": self.lengths}
        for name, values in rows.items():
            write_rows(self.folder / f"{name}.npy", [values], dtype=values.dtype, shape=values.shape)
        write_rows(self.folder / "counts.npy", self._read("counts", np.int32), dtype=np.int32, shape=(self.num,))
        edges = self._write_terms()
        write_rows(self.folder / "frequencies.npy", [self.frequencies], dtype=np.int64, shape=self.frequencies.shape)
        write_rows(self.folder / "edges.npy", [edges], dtype=np.float64, shape=edges.shape)
        ends = np.concatenate([[0], np.cumsum(self.frequencies)])
        # Terms whose lists are sorted together: as many as have _SORTED postings, at least one.
        cuts = [0]
        while cuts[-1] < len(self.hashes):
            cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, ends[cuts[-1]] + _SORTED, side="right")) - 1))
        self._divide(np.array(cuts))
        self._write_lists(cuts, edges)

    def _read(self, name: str, dtype: Any, *, width: int = 1) -> Iterator[NDArray[Any]]:
        """Yield a raw file in parts of `_PART` rows."""
        with _raw(self.folder, name).open("rb") as file:
            while len(part := np.fromfile(file, dtype=dtype, count=_PART * width)):
                yield part if width == 1 else part.reshape(-1, width)

    def _chunks_of(self, start: int, count: int) -> NDArray[np.int32]:
        """Return the chunk (count,) of each posting, from the posting `start` on."""
        low, high = np.searchsorted(self.starts, (start, start + count), side="right")
        inner = np.clip(self.starts[low - 1 : high + 1], start, start + count)
        return np.repeat(np.arange(low - 1, low - 2 + len(inner), dtype=np.int32), np.diff(inner))

    def _write_terms(self) -> Doubles:
        """Write the number of each term, count the chunks of each, and return the bounds of the tiers."""
        histogram = np.zeros(1 << 12, dtype=np.int64)
        done = 0
        with _raw(self.folder, "terms").open("wb") as file:
            for hashes, counts in zip(self._read("hashes", np.uint64), self._read("counts", np.int32), strict=True):
                terms = np.searchsorted(self.hashes, hashes).astype(np.int32)
                _append(file, terms)
                np.add.at(self.frequencies, terms, 1)
                share = saturation(counts, self.lengths[self._chunks_of(done, len(terms))], self.mean)
                histogram += np.bincount((share * len(histogram)).astype(np.int64), minlength=len(histogram))
                done += len(terms)
        _raw(self.folder, "hashes").unlink()
        write_rows(self.folder / "terms.npy", self._read("terms", np.int32), dtype=np.int32, shape=(self.num,))
        # Tiers are bounded by values that as many postings lie between.
        wanted = self.num * np.arange(1, TIERS) / TIERS
        inner = (np.searchsorted(np.cumsum(histogram), wanted, side="left") + 1) / len(histogram)
        return np.concatenate([[0.0], inner, [1.0]])[::-1]

    def _divide(self, cuts: Ints) -> None:
        """Write terms, chunks and counts of the postings between two cuts to a file for each two."""
        done = 0
        for terms, counts in zip(self._read("terms", np.int32), self._read("counts", np.int32), strict=True):
            rows = np.stack([terms, self._chunks_of(done, len(terms)), counts], axis=1)
            place = np.searchsorted(cuts, terms, side="right") - 1
            order = np.argsort(place, kind="stable")
            rows, ends = rows[order], np.cumsum(np.bincount(place, minlength=len(cuts) - 1))
            for number, (start, stop) in enumerate(pairwise([0, *ends.tolist()])):
                if start < stop:  # opened one by one, because a process may have few open files
                    with _raw(self.folder, f"lists-{number}").open("ab") as file:
                        _append(file, rows[start:stop])
            done += len(terms)
        for name in ("terms", "counts"):
            _raw(self.folder, name).unlink()

    def _write_lists(self, cuts: list[int], edges: Doubles) -> None:
        sizes = np.zeros((len(self.hashes), TIERS), dtype=np.int32)

        def lists() -> Iterator[NDArray[np.int32]]:
            """Yield the chunks of the lists. Two files are written in one pass, so weights go to a raw file first."""
            with _raw(self.folder, "weights").open("wb") as weights:
                for number, (first, last) in enumerate(pairwise(cuts)):
                    for rows, share, tier in self._sorted(f"lists-{number}", first, last, edges, sizes):
                        idf = inverse_frequency(self.frequencies[rows[:, 0]], len(self.lengths))
                        _append(weights, (idf * share).astype(np.float32))
                        del share, tier
                        yield rows[:, 1]
                    _raw(self.folder, f"lists-{number}").unlink()

        write_rows(self.folder / "chunks.npy", lists(), dtype=np.int32, shape=(self.num,))
        write_rows(self.folder / "weights.npy", self._read("weights", np.float32), dtype=np.float32, shape=(self.num,))
        begins = np.concatenate([[0], np.cumsum(self.frequencies)])[:-1, None]
        tiers = (
            begins[at : at + _BLOCK] + np.pad(np.cumsum(sizes[at : at + _BLOCK], axis=1, dtype=np.int64), ((0, 0), (1, 0)))
            for at in range(0, len(sizes), _BLOCK)
        )
        write_rows(self.folder / "tiers.npy", tiers, dtype=np.int64, shape=(len(sizes), TIERS + 1))

    def _sorted(
        self, name: str, first: int, last: int, edges: Doubles, sizes: NDArray[np.int32]
    ) -> Iterator[tuple[NDArray[np.int32], Doubles, NDArray[np.int8]]]:
        """Yield the postings of the terms from first to last, sorted by term, tier and chunk, and count the tiers."""

        def parts() -> Iterator[tuple[NDArray[np.int32], Doubles, NDArray[np.int8]]]:
            for rows in self._read(name, np.int32, width=3):
                share = saturation(rows[:, 2], self.lengths[rows[:, 1]], self.mean)
                yield rows, share, _tier(share, edges)

        if last - first == 1:  # the list of one term can be longer than what is sorted at a time, but has few tiers
            for wanted in range(TIERS):
                for rows, share, tier in parts():
                    some = tier == wanted
                    sizes[first, wanted] += int(some.sum())
                    yield rows[some], share[some], tier[some]
            return
        rows, share, tier = (np.concatenate(column) for column in zip(*parts(), strict=True))
        keys = (rows[:, 0] - np.int32(first)).astype(np.int64) * TIERS + tier
        sizes[first:last] = np.bincount(keys, minlength=(last - first) * TIERS).reshape(-1, TIERS)
        order = np.argsort(keys, kind="stable")
        yield rows[order], share[order], tier[order]


def _append(file: BinaryIO, values: NDArray[Any]) -> None:
    if values.size:
        file.write(np.ascontiguousarray(values).data.cast("B"))


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
