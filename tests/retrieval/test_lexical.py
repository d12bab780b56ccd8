import math

import numpy as np
import pytest

from lightning_align.retrieval.lexical import LexicalSearcher, build_lexical, words
from lightning_align.retrieval.neighbors import Forbidden, group_of_chunks
from lightning_align.retrieval.stages import Team
from lightning_align.retrieval.tables import ChunkTable
from tests.retrieval.helpers import BYTES, chunk, texts

DECODE = BYTES.tokenizer.decode
NOTHING = np.zeros(0, dtype=np.int64)


def slow_bm25(chunks: list[list[str]], query: list[str], k1=1.5, b=0.75) -> list[float]:
    """Compute BM25 (Robertson and Zaragoza 2009) with the idf of Lucene, which is never negative."""
    mean = sum(map(len, chunks)) / len(chunks)
    scores = []
    for chunk_words in chunks:
        score = 0.0
        for word in set(query):
            df = sum(word in other for other in chunks)
            tf = chunk_words.count(word)
            idf = math.log(1 + (len(chunks) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(chunk_words) / mean))
        scores.append(score)
    return scores


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("lexical")
    stage = chunk(root, texts(12), size=64)
    table = ChunkTable(stage.folder)
    return table, build_lexical(root, stage, DECODE, team=Team(), verify=0.0)


def test_scores_equal_the_formula(built):
    table, stage = built
    searcher = LexicalSearcher(stage, group_of_chunks(table, NOTHING), DECODE)
    chunks = [words(DECODE(table.chunk(i).tolist())) for i in range(len(table))]
    for number in (0, 7, len(table) - 1):
        (terms,) = searcher.terms([table.chunk(number)])
        assert np.allclose(searcher.scores(terms), slow_bm25(chunks, chunks[number]), atol=1e-4)


def test_best_allowed_chunks_are_returned_in_order(built):
    table, stage = built
    deleted = np.array([3])
    groups = group_of_chunks(table, deleted)
    searcher = LexicalSearcher(stage, groups, DECODE)
    queries = searcher.queries_of(table, range(0, 5))
    found = searcher.nearest(queries, 6, Forbidden(np.arange(5), groups[:5]))
    for row, query in enumerate(queries):
        scores = np.where((groups == groups[row]) | (groups == -1), 0, searcher.scores(query))
        best = np.sort(scores)[::-1][:6]
        assert np.allclose(-found.distances[row][found.mask[row]], best[best > 0], atol=1e-6)
        assert 3 not in table.document_of(found.ids[row][found.mask[row]])


def test_unknown_words_find_nothing(built):
    table, stage = built
    searcher = LexicalSearcher(stage, group_of_chunks(table, NOTHING), DECODE)
    found = searcher.nearest(searcher.terms([[3 + byte for byte in b"zzzzzz qqqqqq"]]), 3, Forbidden(NOTHING, NOTHING))
    assert not found.mask.any() and np.isinf(found.distances).all() and (found.ids == 0).all()


def test_chunks_without_words_raise(tmp_path):
    with pytest.raises(ValueError, match="no chunk has one"):
        build_lexical(tmp_path, chunk(tmp_path, {"a": "... --- ..."}), DECODE, team=Team(), verify=0.0)
