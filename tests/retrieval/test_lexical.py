import math
import shutil
import tracemalloc
import unicodedata
from collections import Counter

import numpy as np
import pytest

from lightning_align.retrieval import inversion, postings
from lightning_align.retrieval.inversion import Span, count_terms, write_postings
from lightning_align.retrieval.lexical import LexicalSearcher, build_lexical
from lightning_align.retrieval.neighbors import Forbidden, group_of_chunks
from lightning_align.retrieval.postings import Postings
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retrieval.words import WordsConfig, words_key
from lightning_align.retrieval.words import terms as terms_of
from tests.retrieval.helpers import BYTES, chunk, hashes, texts

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
    chunks = [terms_of(DECODE(table.chunk(i).tolist()), WordsConfig()) for i in range(len(table))]
    for number in (0, 7, len(table) - 1):
        (terms,) = searcher.terms([table.chunk(number)])
        assert np.allclose(searcher.scores(terms, np.arange(len(table))), slow_bm25(chunks, chunks[number]), rtol=1e-12)


def test_best_allowed_chunks_are_returned_in_order(built):
    table, stage = built
    deleted = np.array([3])
    groups = group_of_chunks(table, deleted)
    searcher = LexicalSearcher(stage, groups, DECODE)
    queries = searcher.queries_of(table, range(0, 5))
    found = searcher.nearest(queries, 6, Forbidden(np.arange(5), groups[:5]))
    for row, query in enumerate(queries):
        scores = np.where((groups == groups[row]) | (groups == -1), 0, searcher.scores(query, np.arange(len(table))))
        best = np.sort(scores)[::-1][:6]
        assert np.allclose(-found.distances[row][found.mask[row]], best[best > 0], atol=1e-6)
        assert 3 not in table.document_of(found.ids[row][found.mask[row]])


@pytest.mark.parametrize("whole", [10**9, 0])
def test_pages_are_returned_within_a_query(built, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    """In a corpus of gigabytes a single query reads a hundred megabytes: memory must not grow with the corpus."""
    table, stage = built
    monkeypatch.setattr(postings, "_WHOLE", whole)
    searcher = LexicalSearcher(stage, group_of_chunks(table, NOTHING), DECODE)
    queries, nobody = searcher.queries_of(table, range(0, 5)), Forbidden(NOTHING, NOTHING)
    expected, released = searcher.nearest(queries, 6, nobody), []
    monkeypatch.setattr(postings, "release_pages", released.append)
    monkeypatch.setattr(postings, "_RETURNED", 2)
    monkeypatch.setattr(postings, "_TOGETHER", 2)
    found = searcher.nearest(queries, 6, nobody)
    assert len(released) > 3 * len(queries) and set(released) == {stage.folder}
    for name in ("ids", "distances", "mask"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_unknown_words_find_nothing(built):
    table, stage = built
    searcher = LexicalSearcher(stage, group_of_chunks(table, NOTHING), DECODE)
    found = searcher.nearest(searcher.terms([[3 + byte for byte in b"zzzzzz qqqqqq"]]), 3, Forbidden(NOTHING, NOTHING))
    assert not found.mask.any() and np.isinf(found.distances).all() and (found.ids == 0).all()


def test_chunks_without_words_raise(tmp_path):
    with pytest.raises(ValueError, match="no chunk has one"):
        build_lexical(tmp_path, chunk(tmp_path, {"a": "... --- ..."}), DECODE, team=Team(), verify=0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Größe STRASSE straße", ["grösse", "strasse", "strasse"]),
        ("caf\u0065\u0301 café \uff21\ufb01", ["café", "café", "afi"]),
        ("getUserName", ["getusername", "get", "user", "name"]),
        ("parseHTTPHeader2 utf8", ["parsehttpheader2", "parse", "http", "header2", "utf8"]),
        ("get_user_name __init__", ["get_user_name", "get", "user", "name", "init"]),
        ("ABC Title lower", ["abc", "title", "lower"]),
        ("東京の天気abc", ["東京", "京の", "の天", "天気", "abc"]),
        ("猫 x", ["猫", "x"]),
        ("हिन्दी", ["हिन्दी"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("x\u200dy... --- don't", ["xy", "don", "t"]),
    ],
)
def test_terms_by_hand(text, expected):
    assert terms_of(text, WordsConfig()) == expected


def test_terms_do_not_depend_on_the_form_of_a_text():
    for text in ("Größere Bäume é", "ガギグ がぎぐ", "เมืองหลวงน้ำ", "한국어", "हिन्दी"):
        forms = {str(terms_of(unicodedata.normalize(form, text), WordsConfig())) for form in ("NFC", "NFD", "NFKC", "NFKD")}
        assert len(forms) == 1, text


def test_language_and_segmenter_are_settings():
    text = "The cats are running"
    assert terms_of(text, WordsConfig()) == ["the", "cats", "are", "running"]
    assert terms_of(text, WordsConfig(language="english", stop_words=True)) == ["cats", "running"]
    assert terms_of("aB_c", WordsConfig(identifiers=False)) == ["ab_c"]
    assert terms_of("東京都", WordsConfig(segmenter="builtins:list")) == ["東", "京", "都"]
    keys = [
        words_key(config) for config in (WordsConfig(), WordsConfig(identifiers=False), WordsConfig(segmenter="builtins:list"))
    ]
    assert len({key["probe"] for key in keys}) == 3
    for message, options in (
        ("need a `language`", {"stemming": True}),
        ("must be module:function", {"segmenter": "jieba"}),
    ):
        with pytest.raises(ValueError, match=message):
            WordsConfig(**options)
    for message, options in (
        ("must have stop words in bm25s .*, but got 'klingon'", {"language": "klingon", "stop_words": True}),
        ("can be imported, but got 'no_such:f'", {"segmenter": "no_such:f"}),
    ):
        with pytest.raises(ValueError, match=message):
            terms_of("東京 the", WordsConfig(**options))


def test_the_search_analyzes_as_the_index_did(tmp_path):
    chunks = chunk(tmp_path, {"a": "getUserName(x)", "b": "東京都の天気", "c": "other things"}, size=64)
    for config, query, found in (
        (WordsConfig(), "user name", [0]),
        (WordsConfig(identifiers=False), "user name", []),
        (WordsConfig(), "京都", [1]),
        (WordsConfig(segmenter="builtins:list"), "都", [1]),
    ):
        stage = build_lexical(tmp_path, chunks, DECODE, team=Team(), verify=0.0, words=config)
        searcher = LexicalSearcher(stage, group_of_chunks(ChunkTable(chunks.folder), NOTHING), DECODE)
        ids = [3 + byte for byte in query.encode()]
        nearest = searcher.nearest(searcher.terms([ids]), 2, Forbidden(NOTHING, NOTHING))
        assert nearest.ids[0][nearest.mask[0]].tolist() == found, (config, query)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An index over 4,000 chunks whose words are as frequent as those of a language, and the chunks."""
    draw, folder = np.random.default_rng(0), tmp_path_factory.mktemp("postings")
    lists = [[f"w{word}" for word in (draw.zipf(1.4, draw.integers(0, 40)) % 900).tolist()] for _ in range(4000)]
    return folder, lists, write_postings(folder, count_terms(lists))


@pytest.mark.parametrize(
    ("share", "first", "worth", "whole"),
    [(0.6, 2048, 1e-9, 0), (0.2, 50, 1e-9, 0), (1.0, 1, 1e-9, 0), (0.9, 500, 5, 0), (0.5, 2048, 1e9, 0), (0.5, 2048, 5, 1e9)],
)
def test_the_best_of_the_pruned_search_are_the_best_of_all(many, monkeypatch, share, first, worth, whole):
    folder, lists, _ = many
    monkeypatch.setattr(postings, "_WHOLE", whole)
    monkeypatch.setattr(postings, "_WORTH", worth)
    monkeypatch.setattr(postings, "_SHARE", share)
    monkeypatch.setattr(postings, "_FIRST", first)
    monkeypatch.setattr(postings, "_MANY", 40)
    groups = np.arange(4000) // 10
    groups[50:70] = -1
    search, counts = Postings(folder, groups), [Counter(words) for words in lists]
    mean, frequencies = np.mean([len(words) for words in lists]), Counter(word for words in counts for word in words)
    for number in range(0, 4000, 199):
        words, scores = sorted(set(lists[number])), np.zeros(4000)
        query = search.numbers(words)
        for word in words:
            idf = math.log(1 + (4000 - frequencies[word] + 0.5) / (frequencies[word] + 0.5))
            tf = np.array([found[word] for found in counts])
            scores += idf * tf / (tf + 1.5 * (0.25 + 0.75 * np.array([len(words) for words in lists]) / mean))
        scores[(groups == groups[number]) | (groups == -1)] = 0
        for k in (1, 8):
            ids, found = search.best(query, k, [groups[number]])
            best = np.sort(scores)[::-1][:k]
            assert np.allclose(found, best[best > 0], rtol=1e-12)
            assert np.allclose(found, scores[ids], rtol=1e-12) and len(set(ids.tolist())) == len(ids)


def test_the_index_does_not_depend_on_how_much_is_sorted_at_a_time(many, monkeypatch, tmp_path):
    folder, lists, num_terms = many
    for name, value in (("_SORTED", 700), ("_PART", 333), ("_BLOCK", 100)):
        monkeypatch.setattr(inversion, name, value)
    assert write_postings(tmp_path, count_terms(lists)) == num_terms
    assert hashes(tmp_path) == hashes(folder)


def test_memory_to_write_does_not_grow_with_the_postings(monkeypatch, tmp_path):
    for name in ("_SORTED", "_PART"):
        monkeypatch.setattr(inversion, name, 1 << 14)
    per_chunk, peaks = 64, []
    for num_blocks in (4, 16):

        def spans(num_blocks=num_blocks):
            draw = np.random.default_rng(0)
            for _ in range(num_blocks):
                terms = np.sort(draw.choice(5000, (500, per_chunk)), axis=1).astype(np.uint64) * np.uint64(2**40)
                ones = np.ones(500, dtype=np.int32)
                yield Span(terms.reshape(-1), np.ones(terms.size, dtype=np.int32), ones.astype(np.int64) * per_chunk, ones * 64)

        tracemalloc.start()
        write_postings(tmp_path / str(num_blocks), spans())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A posting has 16 bytes on disk. What is held per chunk is where it begins, and its length.
    assert peaks[1] - peaks[0] < 12 * 500 * 100, peaks


@pytest.mark.parametrize("content", ["[]", '{"vocabulary": 3}', '{"vocabulary": {"a": "b"}}', "{"])
def test_a_damaged_vocabulary_of_an_earlier_release_is_named(built, tmp_path, content):
    table, stage = built
    shutil.copytree(stage.folder, tmp_path / stage.folder.name)
    (tmp_path / stage.folder.name / "words.json").write_text(content)
    with pytest.raises(ValueError, match=r"words\.json cannot be used: .* Build the database again"):
        LexicalSearcher(Stage(tmp_path, stage.name, stage.inputs), group_of_chunks(table, NOTHING), DECODE)
