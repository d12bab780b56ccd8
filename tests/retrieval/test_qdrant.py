import numpy as np
import pytest

from lightning_align.retrieval import qdrant
from lightning_align.retrieval.qdrant import QdrantRetriever
from lightning_align.retro.indexing import build_database, delete_documents, open_retriever
from tests.retrieval.helpers import Listed, Projection, texts

pytest.importorskip("qdrant_client")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    root = tmp_path_factory.mktemp("qdrant")
    documents = texts(20) | {"it's": "a name with a quote " * 4, "copy": texts(20)["d0"]}
    build_database(root / "database", Listed(documents), encoder=Projection(), chunk_size=16, k=3)
    return delete_documents(root / "database", ["d3"], encoder=Projection())


def test_qdrant_results_equal_faiss_results(database, tmp_path, monkeypatch):
    monkeypatch.setattr(qdrant, "_QUERIES", 2)
    store = QdrantRetriever.create(tmp_path / "store", database, encoder=Projection())
    faiss = open_retriever(database.folder, encoder=Projection())
    chunks = database.chunks
    queries = [chunks.chunk(number) for number in (0, 7, 30)]
    exclude = [["d0"], ["it's", "d1", "no such document"], []]
    ours, theirs = store.search(queries, 5, exclude), faiss.search(queries, 5, [["d0"], ["it's", "d1"], []])
    # Copies are equally near, and Qdrant rounds their distances on their own.
    assert np.array_equal(np.sort(ours.ids), np.sort(theirs.ids)) and np.array_equal(ours.mask, theirs.mask)
    assert np.allclose(ours.distances, theirs.distances, atol=1e-4)
    assert np.array_equal(ours.tokens.ids, theirs.tokens.ids) and np.array_equal(ours.tokens.mask, theirs.tokens.mask)
    names = {chunks.document_ids[number] for number in chunks.document_of(ours.ids[0])}
    assert names.isdisjoint({"d0", "copy"})  # near-duplicates of what is excluded
    everything = store.search(queries[:1], 1000)
    found = chunks.document_of(everything.ids[everything.mask])
    assert "d3" not in {chunks.document_ids[number] for number in found} and everything.mask.sum() < len(chunks)
    assert (store.chunk_size, store.tokenizer_fingerprint) == (faiss.chunk_size, faiss.tokenizer_fingerprint)
    store.client.close()
    again = QdrantRetriever(tmp_path / "store", encoder=Projection())
    assert np.allclose(again.search(queries, 5, exclude).distances, ours.distances, atol=1e-4)
    again.client.close()


def test_invalid_arguments_raise(database):
    client = QdrantRetriever.create(":memory:", database, encoder=Projection()).client
    with pytest.raises(ValueError, match=r"Create it with QdrantRetriever"):
        QdrantRetriever(client, encoder=Projection(), collection="other")
    with pytest.raises(ValueError, match="was built with, projection-8-0, but got projection-8-1"):
        QdrantRetriever.create(":memory:", database, encoder=Projection(seed=1))
    with pytest.raises(ValueError, match="different encoders cannot be compared"):
        QdrantRetriever(client, encoder=Projection(seed=1))
    with pytest.raises(ValueError, match="has a collection 'chunks' already"):
        QdrantRetriever.create(client, database, encoder=Projection())
    store = QdrantRetriever(client, encoder=Projection())
    with pytest.raises(ValueError, match="`k` must be at least 1, but got 0"):
        store.search([[1]], 0)
    with pytest.raises(ValueError, match="got 1 lists for 2 queries"):
        store.search([[1], [2]], 1, [[]])
