import json
import pickle

import numpy as np
import pytest

from lightning_align.data.documents import (
    DocumentTokenizer,
    FolderDocuments,
    RowDocuments,
    StandardLibrary,
    load_documents,
)
from lightning_align.data.tokenizer import FileTokenizer, train_tokenizer
from lightning_align.retrieval import chunks as chunks_module
from lightning_align.retrieval.chunks import append_chunks, build_chunks, token_dtype
from lightning_align.retrieval.stages import Team
from lightning_align.retrieval.tables import ChunkTable
from tests.retrieval.helpers import BYTES, Listed, chunk, hashes, texts, write_folder

ODD = {
    "a": "x",
    "b": "héllo wörld " * 9,
    "c": "日本語のテキスト" * 7,
    "d": "0123456789abcd",
    "e": "0123456789abcde",
    "f": "q" * 50,
}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "rows.jsonl").write_text(json.dumps({"text": " ".join(ODD.values())}) + "\n", encoding="utf-8")
    train_tokenizer(str(folder / "rows.jsonl"), output=str(folder / "t.json"), vocab_size=300)
    return FileTokenizer(str(folder / "t.json"))


@pytest.mark.parametrize("size", [1, 7, 16])
def test_chunks_equal_a_plain_loop(tmp_path, size, bpe):
    for tokenizer in (BYTES, DocumentTokenizer(bpe)):
        stage = build_chunks(tmp_path, Listed(ODD), tokenizer, chunk_size=size, team=Team(), verify=1.0)
        table, number = ChunkTable(stage.folder), 0
        for document, (name, text) in enumerate(ODD.items()):
            (encoding,) = tokenizer.tokenizer.encode_batch([text])
            run = [tokenizer.bos_id, *encoding.ids, tokenizer.eos_id]
            assert table.document_ids[document] == name
            assert table.chunks_of(document) == range(number, number + -(-len(run) // size))
            for start in range(0, len(run), size):
                rest = run[start + size : start + 2 * size]
                assert table.chunk(number).tolist() == run[start : start + size]
                ids, mask = table.continuation(number)
                assert ids[mask].tolist() == rest and mask.tolist() == [True] * len(rest) + [False] * (size - len(rest))
                assert set(ids[~mask].tolist()) <= {tokenizer.pad_id}
                assert int(table.document_of(number)) == document
                number += 1
            own = table.chunks_of(document)
            assert table.num_bytes[own.start : own.stop].sum() == len(text.encode())
        assert len(table) == number


def test_bytes_are_counted_where_their_characters_begin(tmp_path):
    # bos + "aé" + "bc" + eos in chunks of 3: <bos> a é(1) | é(2) b c | <eos>; é counts in the chunk where it begins
    table = ChunkTable(chunk(tmp_path, {"x": "aébc"}, size=3).folder)
    assert [table.chunk(i).tolist() for i in range(3)] == [[1, 100, 198], [172, 101, 102], [2]]
    assert table.num_bytes.tolist() == [1, 4, 0]


def test_byte_counts_do_not_change_other_arrays(tmp_path, bpe):
    for number, tokenizer in enumerate((BYTES, DocumentTokenizer(bpe))):
        options = {"chunk_size": 7, "team": Team(), "verify": 1.0}
        counted = build_chunks(tmp_path / str(number), Listed(ODD), tokenizer, **options)
        stage = build_chunks(tmp_path / str(number), Listed(ODD), tokenizer, byte_counts=False, **options)
        first, second = ChunkTable(counted.folder), ChunkTable(stage.folder)
        assert first.has_byte_counts and not second.has_byte_counts and not (stage.folder / "num_bytes.npy").exists()
        for name in ("tokens", "token_offsets", "chunk_offsets", "groups", "signatures"):
            assert np.array_equal(getattr(first, name), getattr(second, name))


def test_gather_takes_any_shape_and_stays_in_the_document(tmp_path):
    table = ChunkTable(chunk(tmp_path, {"x": "a" * 10, "y": "b" * 3}, size=4).folder)
    ids, mask = table.gather(np.array([[0, 2], [1, 3]]), 8)
    assert ids.shape == mask.shape == (2, 2, 8)
    # bos + 10 + eos are 12 tokens in three chunks, bos + 3 + eos are 5 tokens in two chunks
    assert mask.sum(-1).tolist() == [[8, 4], [8, 5]]
    assert ids[1, 1].tolist() == [1, 101, 101, 101, 2, 0, 0, 0]
    with pytest.raises(IndexError, match="chunk numbers from 0 to 4, but got 5 to 5"):
        table.gather([5])
    with pytest.raises(IndexError):
        table.gather([-1])


def test_pickled_table_holds_only_its_path(tmp_path):
    table = ChunkTable(chunk(tmp_path, texts(50)).folder)
    assert table.tokens.size > 10_000 and isinstance(table.tokens, np.memmap) and table.tokens.dtype == np.uint16
    sent = pickle.dumps(table)
    assert len(sent) < 500
    assert pickle.loads(sent).chunk(7).tolist() == table.chunk(7).tolist()


def test_token_dtype_is_the_smallest_that_fits():
    assert [token_dtype(size) for size in (259, 1 << 16, (1 << 16) + 1)] == [np.uint16, np.uint16, np.int32]


def test_stopped_build_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks_module, "BLOCK_BYTES", 500)
    whole = chunk(tmp_path / "whole", texts(30))

    class Failing(Listed):
        readings = 0

        def documents(self):
            self.readings += 1
            for number, document in enumerate(super().documents()):
                if self.readings == 2 and number == 20:
                    raise KeyboardInterrupt
                yield document

    with pytest.raises(KeyboardInterrupt):
        chunk(tmp_path / "stopped", Failing(texts(30)))
    assert len(list((tmp_path / "stopped").rglob("*.npz"))) > 3
    chunk(tmp_path / "stopped", texts(30), verify=0.0)
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
    monkeypatch.setattr("lightning_align.retrieval.chunks._chunk", None)
    assert chunk(tmp_path / "whole", texts(30)).key == whole.key  # the finished stage is not built again


def test_appended_chunks_equal_a_joint_build(tmp_path):
    first, second = texts(5), texts(5, seed=1, prefix="e")
    before, added = chunk(tmp_path, first), chunk(tmp_path, second)
    both = ChunkTable(append_chunks(tmp_path, before, added, deleted=[], team=Team()).folder)
    whole = ChunkTable(chunk(tmp_path, {**first, **second}).folder)
    for name in ("tokens", "token_offsets", "chunk_offsets", "num_bytes", "groups", "signatures"):
        assert np.array_equal(getattr(both, name), getattr(whole, name))
    with pytest.raises(ValueError, match="document 'd0' already"):
        append_chunks(tmp_path, before, before, deleted=[], team=Team())
    append_chunks(tmp_path, before, before, deleted=range(5), team=Team())


def test_invalid_input_raises(tmp_path):
    with pytest.raises(ValueError, match="all of its 1 documents are empty"):
        chunk(tmp_path, {"a": ""})
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, but got 0"):
        chunk(tmp_path, {"a": "x"}, size=0)

    class Twice(Listed):
        def documents(self):
            yield from super().documents()
            yield from super().documents()

    with pytest.raises(ValueError, match="two have the name 'a'"):
        chunk(tmp_path, Twice({"a": "x"}))


def test_fast_encoders_equal_the_plain_one(bpe):
    class Plain:
        def __init__(self, tokenizer):
            self.__dict__ = {
                name: getattr(tokenizer, name) for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "fingerprint")
            }
            self.encode_batch = tokenizer.encode_batch

    for tokenizer in (BYTES.tokenizer, bpe):
        for start, step in ((0, 1), (3, 5), (15, 16)):
            fast = DocumentTokenizer(tokenizer).encode(list(ODD.values()), start=start, step=step)
            slow = DocumentTokenizer(Plain(tokenizer)).encode(list(ODD.values()), start=start, step=step)
            for one, other in zip(fast, slow, strict=True):
                assert one.ids.tolist() == other.ids.tolist() and one.marks == other.marks


# -- sources


def test_folder_yields_its_files_in_order(tmp_path):
    write_folder(tmp_path, {"b.txt": "B", "a/x.txt": "A", "a/skip/y.txt": "no", "c.md": "C"})
    source = FolderDocuments(str(tmp_path), glob=["**/*.txt", "*.md"], exclude=["**/skip"])
    assert [tuple(document) for document in source.documents()] == [("a/x.txt", "A"), ("b.txt", "B"), ("c.md", "C")]
    (tmp_path / "b.txt").write_text("changed")
    (tmp_path / "c.md").unlink()
    write_folder(tmp_path, {"d.txt": "D"})
    assert [tuple(document) for document in source.documents()] == [("a/x.txt", "A"), ("b.txt", "changed"), ("d.txt", "D")]


def test_a_split_is_by_file_and_complete(tmp_path):
    write_folder(tmp_path, {f"{i}.txt": str(i) for i in range(200)})
    train = FolderDocuments(str(tmp_path), part="train", held_out=0.2).files
    held_out = FolderDocuments(str(tmp_path), part="held_out", held_out=0.2).files
    assert sorted(train + held_out) == FolderDocuments(str(tmp_path)).files
    assert not set(train) & set(held_out) and 20 < len(held_out) < 60
    (tmp_path / "new.txt").write_text("x")
    assert set(train) <= {*FolderDocuments(str(tmp_path), part="train", held_out=0.2).files}


def test_bad_files_raise_or_are_skipped(tmp_path):
    write_folder(tmp_path, {"a.txt": "text"})
    (tmp_path / "b.bin").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"b.bin is not a text file: byte 1 is 0x89, which is not UTF-8. Leave it out with"):
        list(FolderDocuments(str(tmp_path)).documents())
    with pytest.warns(UserWarning, match="b.bin is skipped"):
        assert len(list(FolderDocuments(str(tmp_path), on_bad_file="skip").documents())) == 1
    (tmp_path / "b.bin").write_bytes(b"ab\0c")
    with pytest.raises(ValueError, match="byte 3 is 0, as in a binary file"):
        list(FolderDocuments(str(tmp_path)).documents())
    for match, arguments in {
        "does not exist": {"folder": str(tmp_path / "no")},
        "is a file: give its path": {"folder": str(tmp_path / "a.txt")},
        "`held_out` must be .* got 1": {"folder": str(tmp_path), "held_out": 1.0},
        "`part` must be .* got 'x'": {"folder": str(tmp_path), "part": "x"},
    }.items():
        with pytest.raises(ValueError, match=match):
            FolderDocuments(**arguments)
    with pytest.raises(ValueError, match="has no file that matches"):
        assert FolderDocuments(str(tmp_path), glob="*.rst").files


def test_rows_are_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "name": "n1"}\n{"text": "two", "name": "n2"}\n')
    assert [tuple(d) for d in load_documents(str(path)).documents()] == [("1", "one"), ("2", "two")]
    assert [d.id for d in RowDocuments(str(path), id="name").documents()] == ["n1", "n2"]
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: the field 'body' must be a string, but got None. The fields .* text, name"
    ):
        list(RowDocuments(str(path), text="body").documents())


def test_the_standard_library_has_sources_and_no_tests():
    files = StandardLibrary().files
    assert {"argparse.py", "json/decoder.py"} <= set(files)
    assert not [name for name in files if {"test", "tests", "site-packages"} & set(name.split("/"))]
