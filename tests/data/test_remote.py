import fsspec
import pytest

from lightning_align.data import remote
from lightning_align.data.documents import FolderDocuments, load_documents
from lightning_align.data.remote import RemoteDocuments
from lightning_align.retrieval.sources import changed_files, stamps, survey
from lightning_align.retro.indexing import build_database

TEXTS = {"a.txt": "one two three " * 30, "sub/b.txt": "Größe 🙂 one " * 200, "c.md": "another one " * 20}


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    for name, text in TEXTS.items():
        files.pipe(f"/texts/{name}", text.encode())
    yield files
    files.rm("/texts", recursive=True)


def test_object_storage_and_a_folder_have_the_same_documents(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 100)
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    expected = list(FolderDocuments(str(tmp_path)).documents())
    sources = [load_documents("memory://texts"), load_documents(f"file://{tmp_path}")]
    assert [list(source.documents()) for source in sources] == [expected, expected]
    assert survey(sources[0]).key == survey(sources[1]).key
    (long, _) = list(sources[0].open_texts())[-1]
    assert len(long.text) < 100 and RemoteDocuments("memory://texts", glob="*.md").files == ["c.md"]
    before = stamps(sources[0])
    assert changed_files(before, sources[0]) == []
    memory.pipe("/texts/a.txt", b"changed")
    memory.pipe("/texts/new.txt", b"new")
    assert survey(sources[0]).key != survey(sources[1]).key
    assert changed_files(before, sources[0]) == ["a.txt", "new.txt"]


def test_a_database_is_built_from_object_storage(tmp_path, memory):
    database = build_database(tmp_path, "memory://texts", encoder="bm25", chunk_size=128, k=1)
    assert database.chunks.document_ids == ["a.txt", "c.md", "sub/b.txt"]


def test_unusable_urls_raise(memory):
    with pytest.raises(ValueError, match="must be a URL that fsspec can read, but got 'nope://x'"):
        RemoteDocuments("nope://x")
    with pytest.raises(ValueError, match="memory://texts has none"):
        load_documents("memory://texts").__class__("memory://texts", glob="*.pdf").files  # noqa: B018
    memory.pipe("/texts/bad.txt", b"abc\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 near byte 4"):
        list(RemoteDocuments("memory://texts").documents())
    memory.pipe("/texts/bad.txt", "é".encode()[:1])
    with pytest.raises(ValueError, match=r"bad.txt ends within a character"):
        list(RemoteDocuments("memory://texts").documents())
