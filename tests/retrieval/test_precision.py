"""Stored vectors and live queries are encoded in one precision, that of the build."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_align.retrieval.dense import DenseQueries
from lightning_align.retrieval.encoders import LMEncoder, build_vectors, in_precision, read_vectors
from lightning_align.retrieval.stages import Stage, Team
from lightning_align.retrieval.tables import ChunkTable
from lightning_align.retro.indexing import build_database, open_retriever, quiet_trainer
from tests.retrieval.helpers import Listed, chunk, texts
from tests.toys import tiny_palm

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def encoder() -> LMEncoder:
    return LMEncoder(tiny_palm(num_tokens=259), fingerprint="tiny")


def stored(root: Path, precision: Any, *, documents: int = 6, previous: Stage | None = None) -> tuple[Stage, list[Any]]:
    chunks = chunk(root, texts(documents))
    stage = build_vectors(
        root,
        chunks,
        encoder(),
        team=Team(),
        verify=1.0,
        trainer=lambda: quiet_trainer(accelerator="cpu", devices=1, precision=precision),
        previous=previous,
    )
    table = ChunkTable(chunks.folder)
    return stage, [table.chunk(number) for number in range(len(table))]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_live_query_has_the_vector_of_its_chunk(precision: str, tmp_path: Path) -> None:
    stage, chunks = stored(tmp_path, precision)
    manifest = stage.manifest()
    assert manifest is not None and manifest["table"]["precision"] == precision
    vectors = read_vectors(stage).astype(np.float32)
    live = DenseQueries(encoder(), precision=precision)(chunks)
    assert np.array_equal(live, vectors), "the same batches, so not even the kernels differ"
    if precision != "32-true":
        wide = DenseQueries(encoder())(chunks)
        assert not np.array_equal(wide, vectors)
        with torch.autocast("cpu", torch.bfloat16):
            assert np.array_equal(DenseQueries(encoder(), precision="32-true")(chunks), wide)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_retriever_encodes_as_the_build_did(precision: Any, tmp_path: Path) -> None:
    def trainer() -> Any:
        return quiet_trainer(accelerator="cpu", devices=1, precision=precision)

    build_database(tmp_path, Listed(texts(6)), encoder=encoder(), chunk_size=16, k=2, trainer=trainer)
    retriever: Any = open_retriever(tmp_path, encoder=encoder())
    table = ChunkTable(next(tmp_path.glob("chunks-*")))
    found = retriever.search([table.chunk(number) for number in range(len(table))], 1)
    assert np.array_equal(found.ids[:, 0], np.arange(len(table)))
    assert float(found.distances.max()) == 0.0


def test_the_precision_is_an_option_of_the_build(tmp_path: Path) -> None:
    documents = Listed(texts(6))
    wide = build_database(tmp_path, documents, encoder=encoder(), chunk_size=16, k=2)
    narrow = build_database(tmp_path, documents, encoder=encoder(), chunk_size=16, k=2, precision="bf16-true")
    assert wide.manifest["stages"]["vectors"] != narrow.manifest["stages"]["vectors"]
    retriever: Any = open_retriever(tmp_path, encoder=encoder())
    assert float(retriever.search([narrow.chunks.chunk(3)], 1).distances.max()) == 0.0
    with pytest.raises(ValueError, match="`precision` must be that of the Trainer"):
        build_database(tmp_path, documents, encoder=encoder(), precision="bf16-true", trainer=quiet_trainer)


def test_an_encoder_that_is_no_module_is_left_alone() -> None:
    class Other:
        fingerprint = "other"

        def encode(self, chunks: Any) -> Any:
            return np.zeros((len(chunks), 2), np.float32)

    for precision in (None, *PRECISIONS):
        with in_precision(Other(), precision):
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16-mixed")
