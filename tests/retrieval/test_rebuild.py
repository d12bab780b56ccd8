"""Builds that are forced, and builds that are too large."""

import pytest

from lightning_align import add_documents, delete_documents
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.index import IndexConfig
from lightning_align.retrieval.stages import open_stage
from tests.retrieval.helpers import Listed, Projection, hashes, texts
from tests.retrieval.test_build import build


def test_a_forced_rebuild_makes_all_but_the_chunks_again(tmp_path):
    build(tmp_path, texts(8), encoder=Projection())
    delete_documents(tmp_path, ["d3"], encoder=Projection())
    before, encoder = hashes(tmp_path), Projection()
    used = RetrievalDatabase.open(tmp_path).manifest["stages"].values()
    again = build(tmp_path, texts(8), encoder=encoder, verify=0.0, rebuild=True)
    assert encoder.num_encoded == len(again.chunks) and again.manifest["deleted"] == [3]
    after = hashes(tmp_path)
    assert list(again.manifest["stages"].values()) == list(used)
    assert all(after[name] == value for name, value in before.items() if name.split("/")[0] in used)


def test_more_chunks_than_allowed_end_a_build_before_anything_is_encoded(tmp_path):
    encoder = Projection()
    with pytest.raises(ValueError, match=r"at most `max_chunks` chunks, 10, but they have \d+ of 32 tokens"):
        build(tmp_path, texts(8), encoder=encoder, max_chunks=10)
    assert encoder.num_encoded == 0
    build(tmp_path, texts(8), encoder=encoder, max_chunks=1000)


def test_other_settings_of_the_index_make_another_index(tmp_path):
    def factory(database):
        return open_stage(tmp_path / database.manifest["stages"]["index"]).setting("factory", str)

    made = [
        build(tmp_path, texts(8), encoder=Projection(), index=IndexConfig(factory=name)) for name in ("Flat", "SQ8", "Flat")
    ]
    assert [factory(database) for database in made] == ["Flat", "SQ8", "Flat"]
    assert made[0].manifest == made[2].manifest
    # Additions keep the index, and so does the next build.
    add_documents(tmp_path, Listed(texts(1, seed=5, prefix="n")), encoder=Projection())
    grown = build(tmp_path, texts(8), encoder=Projection(), index=IndexConfig(factory="Flat"))
    assert grown.chunks.num_documents == 9 and factory(grown) == "Flat"
