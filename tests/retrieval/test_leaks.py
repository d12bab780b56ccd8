"""The leak audit finds copies of held-out documents, whatever was done to them, and nothing else."""

import random
from pathlib import Path

import pytest

from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.retrieval.leaks import COMMON, SHARE, find_leaks
from lightning_align.retrieval.tables import ChunkTable
from tests.retrieval.copies import KINDS, audit, grams_of_letters, largest_share, planted, tokenizers
from tests.retrieval.helpers import chunk
from tests.retrieval.test_duplicates import random_text


def leaks(tmp_path: Path, held_out: dict[str, str], database: dict[str, str]) -> dict[tuple[str, str], float]:
    tables = [ChunkTable(chunk(tmp_path, texts, verify=0.0).folder) for texts in (held_out, database)]
    names = [table.document_ids for table in tables]
    return {(names[0][pair.first], names[1][pair.second]): pair.similarity for pair in find_leaks(*tables)}


def test_planted_copies_of_every_kind_are_found_with_every_tokenizer(tmp_path: Path) -> None:
    held_out, database, kinds = planted(27, longest=3000)
    stored = [grams_of_letters(text) for text in database.values()]
    true = {name for name, text in held_out.items() if largest_share(text, stored) >= SHARE}
    assert set(kinds) <= true and len(held_out) > len(true)
    for name, spec in tokenizers(tmp_path, list(database.values())[:20]).items():
        found, _ = audit(tmp_path / name, load_tokenizer(spec), held_out, database)
        for kind in KINDS:
            assert {copied for copied in kinds if kinds[copied] == kind} <= found, (name, kind)
        assert len(found & true) >= 0.95 * len(found), name


def test_shares_equal_those_of_sets(tmp_path: Path) -> None:
    one, other = random_text(60, 0), random_text(60, 1)
    for share in (0.2, 0.5, 0.8):
        cut = int(share * len(one))
        database = {"part": one[:cut] + " " + other, "rest": random_text(80, 2)}
        found = leaks(tmp_path / str(share), {"q": one}, database)
        expected = largest_share(one, [grams_of_letters(database["part"])])
        assert found == ({} if expected < SHARE else {("q", "part"): pytest.approx(expected, abs=0.05)})


def test_a_short_document_within_a_long_one_and_the_reverse_are_found(tmp_path: Path) -> None:
    short, long = random_text(100, 0), random_text(20_000, 1)
    within = f"{long[:50_000]} {short} {long[50_000:]}"
    assert leaks(tmp_path, {"q": short}, {"d": within, "e": random_text(50, 2)})["q", "d"] > 0.6
    assert ("q", "d") in leaks(tmp_path, {"q": long[: len(long) // 2]}, {"d": long, "e": random_text(50, 3)})


def test_text_that_many_documents_have_is_no_copy(tmp_path: Path) -> None:
    license = random_text(60, 99)
    database = {f"d{i}": f"{license} {random_text(60, i)}" for i in range(COMMON + 5)}
    assert leaks(tmp_path, {"q": f"{license} {random_text(60, 50)}"}, database) == {}
    # A document of which all is in the database is a leak, also if many documents have it.
    assert list(leaks(tmp_path, {"q": license}, database)) == [("q", "d0")]
    # Many copies of one document are one.
    copies = {f"d{i}": random_text(60, 7) for i in range(40)} | {"e": random_text(60, 8)}
    assert list(leaks(tmp_path, {"q": random_text(60, 7)}, copies)) == [("q", "d0")]


def test_a_document_that_is_put_together_from_others_is_found(tmp_path: Path) -> None:
    draw = random.Random(0)
    database = {f"d{i}": random_text(200, i) for i in range(30)}
    parts = [database[f"d{i}"].split()[20:60] for i in draw.sample(range(30), 8)]
    mosaic = " ".join(word for part in parts for word in part)
    (found,) = leaks(tmp_path, {"q": mosaic, "other": random_text(300, 100)}, database).items()
    assert found[0][0] == "q" and found[1] > 0.8


def test_unrelated_documents_do_not_leak(tmp_path: Path) -> None:
    held_out = {f"q{i}": random_text(150, 1000 + i) for i in range(20)} | {"short": "yes", "dots": "..."}
    assert leaks(tmp_path, held_out, {f"d{i}": random_text(150, i) for i in range(60)} | {"s": "no"}) == {}
    assert list(leaks(tmp_path, {"short": "Yes\r\n", "blank": "n o"}, {"s": "yes", "t": "no"})) == []
