import numpy as np
import pytest

from lightning_align.retrieval.lance import LanceRetriever
from lightning_align.retro.indexing import build_database, delete_documents, open_retriever
from tests.retrieval.helpers import Listed, Projection, texts

pytest.importorskip("lancedb")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    root = tmp_path_factory.mktemp("lance")
    documents = texts(20) | {"it's": "a name with a quote " * 4}
    build_database(root / "database", Listed(documents), encoder=Projection(), chunk_size=16, k=3)
    return delete_documents(root / "database", ["d3"], encoder=Projection())


def test_lance_results_equal_faiss_results(database, tmp_path):
    store = LanceRetriever.create(tmp_path / "store", database, encoder=Projection())
    faiss = open_retriever(database.folder, encoder=Projection())
    chunks = database.chunks
    queries = [chunks.chunk(number) for number in (0, 7, 30)]
    exclude = [["d0"], ["it's", "d1"], []]
    ours, theirs = (retriever.search(queries, 5, exclude) for retriever in (store, faiss))
    assert np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.mask, theirs.mask)
    assert np.allclose(ours.distances, theirs.distances, atol=1e-4)
    assert np.array_equal(ours.tokens.ids, theirs.tokens.ids) and np.array_equal(ours.tokens.mask, theirs.tokens.mask)
    # Queries that exclude the same documents go in one call.
    many = [chunks.chunk(number) for number in range(0, 60, 2)]
    for exclusion in (None, [["d0", "d5", "no such document"] if row % 3 else ["d1"] for row in range(len(many))]):
        batched = store.search(many, 4, exclusion)
        for row, query in enumerate(many):
            one = store.search([query], 4, None if exclusion is None else [exclusion[row]])
            assert np.allclose(batched.distances[row], one.distances[0], atol=1e-4)
            assert set(batched.ids[row][:2]) & set(one.ids[0])
    everything = store.search(queries[:1], 1000)
    found = chunks.document_of(everything.ids[everything.mask])
    assert "d3" not in {chunks.document_ids[number] for number in found} and everything.mask.sum() < len(chunks)
    assert (store.chunk_size, store.tokenizer_fingerprint) == (faiss.chunk_size, faiss.tokenizer_fingerprint)


def test_invalid_arguments_raise(database, tmp_path):
    with pytest.raises(ValueError, match="Create it with LanceRetriever"):
        LanceRetriever(tmp_path, encoder=Projection())
    with pytest.raises(ValueError, match="was built with, projection-8-0, but got projection-8-1"):
        LanceRetriever.create(tmp_path, database, encoder=Projection(seed=1))
    store = LanceRetriever.create(tmp_path, database, encoder=Projection())
    with pytest.raises(ValueError, match="different encoders cannot be compared"):
        LanceRetriever(tmp_path, encoder=Projection(seed=1))
    with pytest.raises(ValueError, match="cannot be created in"):
        LanceRetriever.create(tmp_path, database, encoder=Projection())
    with pytest.raises(ValueError, match="`k` must be at least 1, but got 0"):
        store.search([[1]], 0)
    with pytest.raises(ValueError, match="got 1 lists for 2 queries"):
        store.search([[1], [2]], 1, [[]])
