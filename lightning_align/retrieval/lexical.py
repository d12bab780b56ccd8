"""Lexical retrieval: BM25 over the words of chunks, as a retriever of its own and to re-rank what dense search found.

On language modelling BM25 beats dense retrieval, and as re-ranker keeps part of the advantage (arXiv 2305.16243). The library
bm25s computes all scores when it indexes (arXiv 2407.03618).
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own

from lightning_align.retrieval.dense import DenseSearcher
from lightning_align.retrieval.neighbors import DELETED, Forbidden, Nearest, pick
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.retrieval.tables import ChunkTable, Floats, Ints

FORMAT = 2
"""Raise it when the same settings come to mean other bytes."""
_STRETCH = 64
_WORD = re.compile(r"\w+")
Decode = Callable[[list[int]], str]


def words(text: str) -> list[str]:
    """The terms of a text: its words, without regard to case."""
    return _WORD.findall(text.lower())


def build_lexical(root: Path, chunks: Stage, decode: Decode, *, team: Team, verify: float) -> Stage:
    """Index the words of all chunks, unless that is done already. One rank does it: it takes less than reading the text.

    Args:
        root: folder of the database.
        chunks: finished stage.
        decode: text of token ids.
        team: the ranks that wait for it.
        verify: whether a finished result is read and compared with its hashes: above 0.
    """
    stage = Stage(root, "lexical", {"format": FORMAT, "chunks": chunks.key})
    with team.together():
        if team.rank == 0 and not stage.is_finished(verify=verify > 0):
            _index(stage, ChunkTable(chunks.folder), decode)
    return stage


def _index(stage: Stage, table: ChunkTable, decode: Decode) -> None:
    import bm25s

    vocabulary: dict[str, int] = {}
    terms = []
    for chunk in tqdm(range(len(table)), desc="lexical", unit=" chunks", disable=None, leave=False):
        found = words(decode(table.chunk(chunk).tolist()))
        terms.append([vocabulary.setdefault(word, len(vocabulary)) for word in found])
    if not vocabulary:
        raise ValueError(
            "no chunk has a word in it, so BM25 has nothing to go by: make chunk_size larger (a byte tokenizer needs several "
            "times as much as one of words), or use a dense encoder"
        )
    model = bm25s.BM25()
    model.index((terms, vocabulary), create_empty_token=False, show_progress=False)
    stage.folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in _ARRAYS:
            np.save(stage.folder / f"{name}.npy", model.scores[name], allow_pickle=False)
        text = json.dumps({"vocabulary": vocabulary, "num_docs": int(model.scores["num_docs"])}, ensure_ascii=False)
        (stage.folder / "words.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{stage.folder}: cannot be written ({error.strerror or error}): free the disk") from error
    counts = {"words": len(vocabulary), "chunks": len(table)}
    stage.finish(table={}, counts=counts, files=[*(f"{name}.npy" for name in _ARRAYS), "words.json"])


_ARRAYS = ("data", "indices", "indptr")


class LexicalSearcher:
    """Finds the chunks that share rare words with a query; chunks that share none are no neighbors.

    Args:
        stage: finished.
        groups: (C,) of each chunk, see `group_of_chunks`.
        decode: text of token ids.
    """

    def __init__(self, stage: Stage, groups: Ints, decode: Decode) -> None:
        import bm25s

        content = json.loads((stage.folder / "words.json").read_text(encoding="utf-8"))
        self.vocabulary: dict[str, int] = content["vocabulary"]
        self.model = bm25s.BM25()
        arrays = {name: np.load(stage.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        self.model.scores = {**arrays, "num_docs": content["num_docs"]}
        self.model.nonoccurrence_array = None
        self.groups, self.decode = groups, decode
        self._by_group = np.argsort(groups, kind="stable")
        self._sorted_groups = groups[self._by_group]

    def queries_of(self, table: ChunkTable, chunks: range) -> list[list[int]]:
        """See `Searcher`: their words."""
        return self.terms([table.chunk(chunk) for chunk in chunks])

    def terms(self, queries: Sequence[ArrayLike]) -> list[list[int]]:
        """The words of runs of tokens, each once, those that no chunk has left out."""
        texts = (self.decode(np.asarray(query).tolist()) for query in queries)
        return [sorted({self.vocabulary[word] for word in words(text) if word in self.vocabulary}) for text in texts]

    def scores(self, query: list[int]) -> Any:
        """(C,) float32 score of every chunk."""
        return self.model.get_scores_from_ids(query)

    def nearest(self, queries: list[list[int]], k: int, forbidden: Forbidden) -> Nearest:
        """See `Searcher`. A distance is a negated score."""
        left_out = _groups_of_rows(forbidden, len(queries))
        candidates = min(k, len(self.groups))
        ids = np.zeros((len(queries), candidates), dtype=np.int64)
        best = np.zeros((len(queries), candidates), dtype=np.float32)
        for row, query in enumerate(queries):
            scores = self.scores(query)
            for group in (DELETED, *left_out[row]):
                scores[self._chunks_of_group(group)] = 0
            top = _largest(scores, candidates)
            ids[row, : len(top)] = top
            best[row, : len(top)] = scores[top]
        return pick(ids, 0 - best, best > 0, k)

    def _chunks_of_group(self, group: int) -> Ints:
        first, last = np.searchsorted(self._sorted_groups, (group, group + 1))
        return self._by_group[first:last]


def _largest(scores: Floats, count: int) -> Ints:
    """Where the largest scores above 0 stand, at most so many of them; of equal ones the first."""
    # A partition would go through all chunks several times. No score among the largest is below the bound: as many stretches as
    # are wanted have one that reaches it.
    whole = len(scores) // _STRETCH * _STRETCH
    peaks = np.append(scores[:whole].reshape(-1, _STRETCH).max(axis=1), scores[whole:].max(initial=0))
    bound = np.partition(peaks, -count)[-count] if count <= len(peaks) else 0
    near = np.flatnonzero(scores >= bound if bound > 0 else scores > 0)
    return near[np.argsort(-scores[near], kind="stable")[:count]]


class HybridSearcher:
    """Takes the nearest chunks of dense search, and of those the ones that share most words with the query.

    Args:
        dense: finds the candidates.
        lexical: ranks them.
        num_candidates: of each query.
    """

    def __init__(self, dense: DenseSearcher, lexical: LexicalSearcher, *, num_candidates: int = 64) -> None:
        self.dense, self.lexical, self.num_candidates = dense, lexical, num_candidates

    def queries_of(self, table: ChunkTable, chunks: range) -> tuple[Any, list[list[int]]]:
        """See `Searcher`: their vectors and their words."""
        return self.dense.queries_of(table, chunks), self.lexical.queries_of(table, chunks)

    def nearest(self, queries: tuple[Any, list[list[int]]], k: int, forbidden: Forbidden) -> Nearest:
        """See `Searcher`. Candidates without a common word stand behind, in the order of dense search, at distance 0."""
        vectors, terms = queries
        found = self.dense.nearest(vectors, max(k, self.num_candidates), forbidden)
        scores = np.stack([self.lexical.scores(query)[ids] for query, ids in zip(terms, found.ids, strict=True)])
        distances: Floats = np.where(found.mask, 0 - scores, np.inf).astype(np.float32)
        order = np.argsort(distances, axis=1, kind="stable")
        mask = np.take_along_axis(found.mask, order, axis=1)
        return pick(np.take_along_axis(found.ids, order, axis=1), np.take_along_axis(distances, order, axis=1), mask, k)


def _groups_of_rows(forbidden: Forbidden, num_rows: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for row, group in zip(forbidden.rows.tolist(), forbidden.groups.tolist(), strict=True):
        rows[row].append(group)
    return rows
