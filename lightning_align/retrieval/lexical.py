"""Lexical retrieval: BM25 over the words of chunks, alone or to rerank the results of dense search.

For language modeling BM25 outperforms dense retrieval, and reranking with BM25 keeps a part of the gain (arXiv 2305.16243).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from lightning_align.retrieval.dense import DenseSearcher
from lightning_align.retrieval.inversion import FILES, Doubles, count_terms, write_postings
from lightning_align.retrieval.neighbors import Forbidden, Nearest, pick
from lightning_align.retrieval.postings import Postings
from lightning_align.retrieval.sealed import value_of
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.retrieval.tables import ChunkTable, Floats, Ints
from lightning_align.retrieval.words import WordsConfig, config_of, earlier_terms, terms, words_key
from lightning_align.runtime.mapped import release_pages

FORMAT = 4
"""Version of the file format. Increase it when the same settings lead to other bytes."""
Decode = Callable[[list[int]], str]
_OFTEN = 64
"""Chunks after which pages of files are returned to the system, if they are many."""


def build_lexical(
    root: Path, chunks: Stage, decode: Decode, *, team: Team, verify: float, words: WordsConfig | None = None
) -> Stage:
    """Index the words of all chunks, unless the finished stage exists. Rank 0 does it alone, because it is fast.

    Args:
        root: Folder of the database.
        chunks: The finished chunk stage.
        decode: Converts token ids to text.
        team: The ranks. Rank 0 does the work and the others wait.
        verify: If above 0, the files of a finished stage are compared with their hashes.
        words: How the terms of a text are found. Default is `WordsConfig()`.

    Raises:
        ValueError: If no chunk has a word, or the disk is full.
    """
    words = words or WordsConfig()
    stage = Stage(root, "lexical", {"format": FORMAT, "chunks": chunks.key, "words": words_key(words)})
    with team.together():
        if team.rank == 0 and not stage.is_finished(verify=verify > 0):
            _index(stage, ChunkTable(chunks.folder), decode, words)
    return stage


def _index(stage: Stage, table: ChunkTable, decode: Decode, config: WordsConfig) -> None:
    def words() -> Iterator[list[str]]:
        for chunk in tqdm(range(len(table)), desc="lexical", unit=" chunks", disable=None, leave=False):
            if chunk % _OFTEN == 0:
                release_pages(stage.root)
            yield terms(decode(table.chunk(chunk).tolist()), config)

    num_terms = write_postings(stage.folder, count_terms(words()))
    if not num_terms:
        raise ValueError(
            "Chunks must have words for BM25, but no chunk has one. Use documents with words, increase `chunk_size` (a byte "
            "tokenizer needs several times the size of a word tokenizer), or use a dense encoder."
        )
    counts = {"words": num_terms, "chunks": len(table)}
    stage.finish(table={"words": words_key(config)}, counts=counts, files=[f"{name}.npy" for name in FILES])


class LexicalSearcher:
    """Finds chunks by BM25. Chunks that share no word with the query are never returned.

    Args:
        stage: The finished lexical stage.
        groups: (C,) group of each chunk, see `group_of_chunks`.
        decode: Converts token ids to text.
    """

    def __init__(self, stage: Stage, groups: Ints, decode: Decode) -> None:
        self.folder = stage.folder
        is_earlier = (stage.folder / "words.json").exists()
        self.postings = _EarlierPostings(stage.folder, groups) if is_earlier else Postings(stage.folder, groups)
        settings = stage.setting("words", dict, default={}) or None
        try:
            config = config_of(settings)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{stage.folder} has settings of words that this version does not know ({error}). Build the database again."
            ) from error
        self._terms: Callable[[str], list[str]] = earlier_terms if config is None else partial(terms, config=config)
        self.decode = decode

    def queries_of(self, table: ChunkTable, chunks: range) -> list[list[int]]:
        """See `Searcher`. Queries are lists of word numbers."""
        return self.terms([table.chunk(chunk) for chunk in chunks])

    def terms(self, queries: Sequence[ArrayLike]) -> list[list[int]]:
        """Return the distinct words of sequences of tokens, as word numbers. Words that no chunk has are dropped."""
        texts = (self.decode(np.asarray(query).tolist()) for query in queries)
        return [self.postings.numbers(self._terms(text)) for text in texts]

    def scores(self, query: list[int], chunks: Ints) -> Any:
        """Compute the scores (n,) of chunks (n,), float64."""
        return self.postings.scores(query, chunks)

    def nearest(self, queries: list[list[int]], k: int, forbidden: Forbidden) -> Nearest:
        """See `Searcher`. The distance is the negated score."""
        shape = len(queries), k
        ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
        distances = np.full(shape, np.inf, dtype=np.float32)
        for row, (query, groups) in enumerate(zip(queries, _groups_of_rows(forbidden, len(queries)), strict=True)):
            if row % _OFTEN == 0:
                release_pages(self.folder)
            found, scores = self.postings.best(query, k, groups)
            ids[row, : len(found)], mask[row, : len(found)], distances[row, : len(found)] = found, True, 0 - scores
        return Nearest(ids, mask, distances)


class _EarlierPostings:
    """The index of release 0.1.0: the score of each word for each chunk that has it, word by word. See `Postings`."""

    def __init__(self, folder: Path, groups: Ints) -> None:
        self.groups, self._vocabulary = groups, _read_vocabulary(folder / "words.json")
        self._scores, self._chunks, self._starts = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("data", "indices", "indptr")
        )

    def numbers(self, terms: Iterable[str]) -> list[int]:
        """Return the distinct numbers of terms, ascending."""
        return sorted({self._vocabulary[term] for term in terms if term in self._vocabulary})

    def scores(self, query: Sequence[int], chunks: Ints) -> Doubles:
        """Compute the scores (n,) of chunks (n,)."""
        total = np.zeros(len(self.groups))
        for term in query:
            span = slice(int(self._starts[term]), int(self._starts[term + 1]))
            total[self._chunks[span]] += self._scores[span]
        return total[chunks]

    def best(self, query: Sequence[int], k: int, forbidden: Sequence[int]) -> tuple[Ints, Doubles]:
        """Find the k chunks of the highest scores above 0, or fewer."""
        scores = self.scores(query, np.arange(len(self.groups)))
        scores[np.isin(self.groups, forbidden) | (self.groups < 0)] = 0
        found: Ints = np.argsort(-scores, kind="stable")[:k]
        found = found[scores[found] > 0]
        return found, scores[found]


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        found: dict[str, int] = value_of(json.loads(path.read_text(encoding="utf-8")), "vocabulary", dict)
        if not all(type(number) is int for number in found.values()):
            raise ValueError(f"its words must have whole numbers, but it has {found!r:.60}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be used: {error}. Build the database again. Only damaged stages are made again."
        ) from error
    return found


class HybridSearcher:
    """Finds candidates by dense search, and reranks them by BM25.

    Args:
        dense: Finds the candidates.
        lexical: Reranks them.
        num_candidates: The number of candidates per query. Default is 64.
    """

    def __init__(self, dense: DenseSearcher, lexical: LexicalSearcher, *, num_candidates: int = 64) -> None:
        self.dense, self.lexical, self.num_candidates = dense, lexical, num_candidates

    def queries_of(self, table: ChunkTable, chunks: range) -> tuple[Any, list[list[int]]]:
        """See `Searcher`. Queries are vectors and lists of word numbers."""
        return self.dense.queries_of(table, chunks), self.lexical.queries_of(table, chunks)

    def nearest(self, queries: tuple[Any, list[list[int]]], k: int, forbidden: Forbidden) -> Nearest:
        """See `Searcher`. Candidates without a common word come last, in the order of dense search, at distance 0."""
        vectors, terms = queries
        found = self.dense.nearest(vectors, max(k, self.num_candidates), forbidden)
        scores = np.stack([self.lexical.scores(query, ids) for query, ids in zip(terms, found.ids, strict=True)])
        distances: Floats = np.where(found.mask, 0 - scores, np.inf).astype(np.float32)
        order = np.argsort(distances, axis=1, kind="stable")
        mask = np.take_along_axis(found.mask, order, axis=1)
        return pick(np.take_along_axis(found.ids, order, axis=1), np.take_along_axis(distances, order, axis=1), mask, k)


def _groups_of_rows(forbidden: Forbidden, num_rows: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for row, group in zip(forbidden.rows.tolist(), forbidden.groups.tolist(), strict=True):
        rows[row].append(group)
    return rows
