import numpy as np
import pytest

from lightning_align.data.documents import DocumentTokenizer, FolderDocuments
from lightning_align.data.tokenizer import ByteTokenizer, FileTokenizer, train_tokenizer
from lightning_align.retrieval import parts
from lightning_align.retrieval.chunks import build_chunks
from lightning_align.retrieval.duplicates import signature, signature_of_parts
from lightning_align.retrieval.stages import Team
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


def test_signature_in_parts_equals_the_signature():
    tokens = np.random.default_rng(0).integers(0, 50, 4000)
    for num in (5, 12, 13, 40, 4000):
        cuts = np.sort(np.random.default_rng(num).integers(0, num, 7))
        assert np.array_equal(signature_of_parts(np.split(tokens[:num], cuts)), signature(tokens[:num]))


def test_a_long_file_is_read_in_pieces(tmp_path, monkeypatch):
    from lightning_align.data import documents

    monkeypatch.setattr(documents, "PIECE", 64)
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
