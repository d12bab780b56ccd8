import random

import numpy as np
import pytest

from lightning_align.data.documents import DocumentTokenizer, FolderDocuments
from lightning_align.data.tokenizer import ByteTokenizer, FileTokenizer, train_tokenizer
from lightning_align.retrieval import parts
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.duplicates import KEPT, shingles, signature, sketch
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.retrieval.tables import ChunkTable
from tests.retrieval.helpers import Listed, hashes, texts, write_folder

WORDS = " ".join(texts(15).values())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "t.json"
    rows = path.with_name("rows.jsonl")
    rows.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts(20, seed=1).values()))
    train_tokenizer(str(rows), output=str(path), vocab_size=320)
    return {"bytes": ByteTokenizer(), "bpe": FileTokenizer(str(path))}


WIDE = WORDS.replace("a", "é").replace("b", "\U0001f600") + "  \n\n x" * 50


@pytest.mark.parametrize(("name", "text"), [("bytes", WIDE), ("bytes", "é" * 3000), ("bpe", WORDS), ("bpe", WIDE)])
def test_a_document_in_parts_has_the_table_of_the_whole_one(tmp_path, monkeypatch, tokenizers, name, text):
    tokenizer = DocumentTokenizer(tokenizers[name])
    documents = {"before": "a short one", "long": text, "after": "another one", "second": text[::-1]}
    options = {"chunk_size": 16, "team": Team(), "verify": 1.0}
    whole = build_chunks(tmp_path / "whole", Listed(documents), tokenizer, **options)
    for size in (999,):
        monkeypatch.setattr(parts, "PART", size)
        cut = build_chunks(tmp_path / f"cut{size}", Listed(documents), tokenizer, **options)
        assert {key: value for key, value in hashes(cut.folder).items() if key != "manifest.json"} == {
            key: value for key, value in hashes(whole.folder).items() if key != "manifest.json"
        }
    table = ChunkTable(cut.folder)
    assert table.num_bytes.sum() == sum(len(document.encode()) for document in documents.values())


def test_other_tokenizers_are_cut_before_white_space(monkeypatch):
    monkeypatch.setattr(parts, "PART", 10)
    document = parts.Document("d", "one two  three\nfour five six seven eight")
    found = list(parts.cut(document, (), lambda text: 0))
    assert "".join(part.text for part in found) == document.text
    assert [part.text[:1].isspace() for part in found] == [False, *[True] * (len(found) - 1)]
    assert [part.is_first for part in found] == [True, *[False] * (len(found) - 1)] and found[-1].is_last
    unbroken = list(parts.cut(parts.Document("d", "x" * 45), (), lambda text: 0))
    assert [len(part.text) for part in unbroken] == [10, 10, 10, 15]


STRANGE = [
    *"ab\u00e9 e\u0301_\u0301\n\r\t\u00a0.\ufeff",
    "\uac00",
    "\u1100\u1161\u11a8",
    "\ufb01",
    "\u0130",
    "\u1e9e",
    "\u03c3\u03c2",
    "\u0345",
    "a\u0323\u0307",
    "\u6771",
    "\u0e40\u0e21\u0e37",
    "\u09c7\u09be",
    "\U0001f600",
    "\ud800",
]
"""Characters whose Unicode forms depend on their neighbors, white space, and what is no letter."""


def recut(text, size, split_point=lambda text: 0):
    """Cut a text into parts of about a number of characters, and return them and what becomes of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", size)
        found = list(parts.cut(parts.Document("d", text), (), split_point))
    assert "".join(part.text for part in found) == text
    return found, parts.WholeText(parts.text_arrays(part) for part in found)


@pytest.mark.parametrize("seed", range(12))
def test_the_sketch_in_parts_is_that_of_the_text(seed):
    draw = random.Random(seed)
    weights = [draw.choice([0.1, 1, 8]) for _ in STRANGE]
    text = "".join(draw.choices(STRANGE, weights, k=draw.choice([300, 3000])))
    for size, split_point in ((40, len), (draw.randint(50, 140), lambda text: 0), (97, lambda text: len(text) - 3)):
        found, whole = recut(text, size, split_point)
        assert len(found) > 1
        same_text(whole, text)


def same_text(whole, text):
    hashes = shingles(text)
    expected, got = sketch(hashes), whole.sketch()
    assert np.array_equal(whole.signature(), signature(hashes))
    assert np.array_equal(got.hashes, expected.hashes) and got.limit == expected.limit


@pytest.mark.parametrize(
    "text", ["... --- \n" * 40, " " * 300, "\ufeff\n" + "=" * 300 + "abc\r\n\t" + "-" * 90, "\u3000" * 200 + "x"]
)
def test_a_long_text_of_few_letters_has_one_hash_of_its_whole(text):
    same_text(recut(text, 41, len)[1], text)


def test_a_sketch_of_as_many_hashes_as_it_keeps_knows_whether_there_are_more():
    text = "".join(random.Random(0).choices("abcdefghij", k=KEPT + 400))
    for length in (KEPT + 30, KEPT + 31, KEPT + 32, KEPT + 400):
        for size in (length - 340, 60) if length > KEPT + 340 else (60, 100):
            same_text(recut(text[:length], size, len)[1], text[:length])
    same_text(recut(text[:400] * 3, 600 - 100, len)[1], text[:400] * 3)


@pytest.mark.parametrize("text", ["x" * 30000, "\u1100\u1161" * 9000])
def test_a_text_without_a_place_to_cut_is_cut_all_the_same(text):
    found, _ = recut(text, 5000)
    assert max(len(part.text) for part in found) <= 10000


def test_a_long_document_that_changes_is_found_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 500)
    source, written = Listed({"a": WORDS, "b": "short"}), []
    tokenizer = DocumentTokenizer(ByteTokenizer())
    options = {"chunk_size": 16, "team": Team(), "verify": 0.0}

    class Changing(Listed):
        def documents(self):
            number = len(written)
            written.append(number)
            texts = self.texts if number == 0 else {**self.texts, "a": self.texts["a"][:-1] + "!"}
            return (parts.Document(*item) for item in texts.items())

    with pytest.raises(ValueError, match="The document 'a' was changed"):
        build_chunks(tmp_path, Changing(source.texts), tokenizer, **options)
    numbers = []
    write = Stage.write_block
    monkeypatch.setattr(
        Stage, "write_block", lambda self, number, arrays: (numbers.append(number), write(self, number, arrays))
    )
    stage = build_chunks(tmp_path, source, tokenizer, **options)
    assert len(numbers) == 1, "only the last part of the long document is cut again"
    other = build_chunks(tmp_path / "other", source, tokenizer, **options)
    assert hashes(stage.folder) == hashes(other.folder)


def test_a_long_file_is_read_in_pieces(tmp_path, monkeypatch):
    from lightning_align.data import texts as reading

    monkeypatch.setattr(reading, "LONG", 64)
    monkeypatch.setattr(reading, "_PIECE", 50)
    text = "Größe 🙂 " * 40
    write_folder(tmp_path, {"long.txt": text, "short.txt": "short"})
    source = FolderDocuments(str(tmp_path))
    (first, rest), _ = source.open_texts()
    assert len(first.text) < 64 and first.text + "".join(rest) == text
    assert [document.text for document in source.documents()] == [text, "short"]
    (tmp_path / "bad.txt").write_bytes(b"x" * 100 + b"\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not a text file: byte 101 is 0xff"):
        list(source.__class__(str(tmp_path)).open_texts())
    (tmp_path / "bad.txt").write_bytes(b"x" * 63 + "é".encode()[:1])
    with pytest.raises(ValueError, match=r"byte 64 is 0xc3, which is not UTF-8"):
        list(source.__class__(str(tmp_path)).open_texts())
