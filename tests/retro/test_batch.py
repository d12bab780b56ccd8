"""Tests of the RETRO dataset: windows and neighbors, compared with the documents that they come from."""

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retro.batch import LiveChunks, RetrievalWindows
from lightning_align.retro.datamodule import RETRODataModule
from lightning_align.retro.indexing import build_database, delete_documents
from tests.retrieval.helpers import Listed, texts
from tests.retro.conftest import HELD_OUT, SIZE


def training(
    database: RetrievalDatabase, *, num_chunks: int = 3, num_neighbors: int = 2, random: float = 0
) -> RetrievalWindows:
    return RetrievalWindows(
        database.chunks,
        database.neighbors,
        database.chunks,
        num_chunks=num_chunks,
        num_neighbors=num_neighbors,
        random_neighbors=random,
    )


def evaluation(database: RetrievalDatabase, *, num_chunks: int = 3, seed: int = 0) -> RetrievalWindows:
    queries = database.queries("validation")
    return RetrievalWindows(
        queries.chunks, queries.neighbors, database.chunks, num_chunks=num_chunks, num_neighbors=3, seed=seed
    )


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 50])
def test_each_token_except_the_first_is_a_target_exactly_once(database: RetrievalDatabase, num_chunks: int) -> None:
    table, windows = database.chunks, training(database, num_chunks=num_chunks)
    seen: Counter[int] = Counter()
    for window in range(len(windows)):
        batch = windows[[window]]
        first, document = int(windows.windows.first[window]), int(windows.windows.document[window])
        start = int(table.token_offsets[document]) + (first - int(table.chunk_offsets[document])) * SIZE
        length = int(batch["mask"].sum())
        assert batch["tokens"][0, :length].tolist() == table.tokens[start : start + length].tolist()
        assert length <= num_chunks * SIZE + 1 and batch["tokens"].shape[1] >= SIZE + 1
        seen.update((start + batch["targets"][0].nonzero().squeeze(1)).tolist())
    firsts = set(table.token_offsets[:-1].tolist())
    assert seen == Counter(place for place in range(len(table.tokens)) if place not in firsts)


def test_neighbors_belong_to_the_full_chunks_of_the_window(database: RetrievalDatabase) -> None:
    windows, table, neighbors = training(database), database.chunks, database.neighbors
    order = np.random.default_rng(0).permutation(len(windows))[:4].tolist()
    batch = windows[order]
    for row, window in enumerate(order):
        first, last = int(windows.windows.first[window]), int(windows.windows.lengths[window]) // SIZE
        for u in range(min(last, batch["neighbors"].tokens.shape[1])):
            for j in range(2):
                got = batch["neighbors"].tokens[row, u, j][batch["neighbors"].mask[row, u, j]].tolist()
                want: list[int] = []
                if neighbors.mask[first + u, j]:
                    both = table.gather(neighbors.ids[first + u, j], 2 * SIZE)
                    want = both.ids[both.mask].tolist()
                assert got == want
    assert bool(batch["neighbors"].mask.any())


def test_random_neighbors_do_not_depend_on_the_batch(database: RetrievalDatabase) -> None:
    rows = list(range(len(training(database))))
    right, some, all_ = (training(database, random=share)[rows]["neighbors"] for share in (0, 0.5, 1))
    chunks = training(database)[rows]["mask"][:, :-1].unflatten(1, (-1, SIZE)).any(-1)  # chunks that exist
    replaced = (some.tokens != right.tokens).any(-1)
    assert 0 < int(replaced[chunks].sum()) < replaced[chunks].numel()
    assert torch.equal(some.tokens[replaced], all_.tokens[replaced])
    # Chunks without neighbors get random ones too. There are none past the end of a row.
    assert bool(all_.mask[chunks][..., 0].all()) and not bool(all_.mask[~chunks].any())
    alone = training(database, random=1)[rows[2:3]]["neighbors"]
    assert torch.equal(alone.tokens[0], all_.tokens[2, : alone.tokens.shape[1]])


def test_controls_do_not_depend_on_the_batch(database: RetrievalDatabase) -> None:
    windows = evaluation(database)
    together = windows[list(range(len(windows)))]
    for window in range(len(windows)):
        alone = windows[[window]]
        for name in ("random", "shuffled"):
            width = alone["controls"][name].tokens.shape[1]
            for one, all_ in zip(alone["controls"][name], together["controls"][name], strict=True):
                assert torch.equal(one[0], all_[window, :width])
    other = evaluation(database, seed=1)[list(range(len(windows)))]
    assert not torch.equal(other["controls"]["random"].tokens, together["controls"]["random"].tokens)


@pytest.mark.parametrize("num_chunks", [1, 2, 50])
def test_chunk_bytes_add_up_to_the_documents(database: RetrievalDatabase, num_chunks: int) -> None:
    windows = evaluation(database, num_chunks=num_chunks)
    totals: Counter[str] = Counter()
    ids = database.queries("validation").chunks.document_ids
    for window in range(len(windows)):
        batch = windows[[window]]
        totals[ids[int(batch["documents"])]] += int(batch["chunk_bytes"].sum())
    assert totals == {f"{name}.txt": len(text.encode()) for name, text in HELD_OUT.items()}


def test_overlap_belongs_to_the_chunk(database: RetrievalDatabase) -> None:
    batch = evaluation(database)[[0]]
    spelled = ByteTokenizer().decode(batch["tokens"][0].tolist())
    assert spelled.startswith("the quick brown")
    # Documents a and b start with "the quick". The first chunk is the beginning-of-sequence token and the 7 letters "the qui".
    assert float(batch["overlap"][0, 0]) == 1.0
    assert bool(((batch["overlap"] >= 0) & (batch["overlap"] <= 1)).all())


def test_pickling_keeps_the_batches(database: RetrievalDatabase) -> None:
    windows = training(database)
    first = windows[[0, 1]]
    again = pickle.loads(pickle.dumps(windows))
    assert torch.equal(again[[0, 1]]["neighbors"].tokens, first["neighbors"].tokens)


def test_more_neighbors_than_in_the_database_raise(database: RetrievalDatabase) -> None:
    with pytest.raises(ValueError, match=r"`num_neighbors` must be at most 3, .* but got 4"):
        training(database, num_neighbors=4)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> RetrievalDatabase:
    """A database of twelve documents with 3 to 6 chunks each. Three of them are deleted."""
    root = tmp_path_factory.mktemp("edited")
    listed = Listed(texts(12, words=8))
    build_database(root, listed, encoder="bm25", queries={"validation": Listed(texts(4, seed=3))}, chunk_size=SIZE, k=3)
    return delete_documents(root, ["d0", "d5", "d11"])


@pytest.mark.parametrize("deletes", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["query set", "own documents"])
def test_random_neighbors_come_from_other_live_documents(edited: RetrievalDatabase, own: bool, deletes: bool) -> None:
    deleted = edited.manifest["deleted"] if deletes else []
    documents = edited if own else edited.queries("validation")
    table = edited.chunks
    options: dict[str, Any] = {"num_chunks": 2, "num_neighbors": 3, "deleted": deleted}
    windows = RetrievalWindows(documents.chunks, documents.neighbors, table, random_neighbors=1.0, **options)
    chunks = np.arange(len(documents.chunks))[:, None]
    found, mask = windows._found(chunks)
    all_ids = found[:, 0]
    assert mask.all() and not np.isin(table.document_of(all_ids), deleted).any()
    if own:
        assert not (table.document_of(all_ids) == table.document_of(chunks)).any()
        assert not np.isin(windows.windows.document, deleted).any()
        kept = set(range(table.num_documents)) - set(deleted)
        assert set(windows.windows.document.tolist()) == kept
    else:
        assert set(windows.windows.document.tolist()) == {0, 1, 2, 3}
        control, there = RetrievalWindows(documents.chunks, documents.neighbors, table, seed=0, **options).controls["random"]
        assert there.all() and not np.isin(table.document_of(control), deleted).any()


def test_replacements_are_uniform_over_the_allowed_chunks(edited: RetrievalDatabase) -> None:
    table, deleted = edited.chunks, edited.manifest["deleted"]
    live, own, random = LiveChunks(table, deleted), 3, np.random.default_rng(0)
    ids = random.integers(0, len(table), 40_000)
    replaced, there = live.replace(ids, random.random(ids.shape), np.full(ids.shape, own))
    allowed = ~np.isin(table.document_of(np.arange(len(table))), [*deleted, own])
    assert there.all() and np.array_equal(replaced[allowed[ids]], ids[allowed[ids]])
    counts = np.bincount(replaced, minlength=len(table))
    assert not counts[~allowed].any()
    expected = len(ids) / allowed.sum()
    assert np.abs(counts[allowed] - expected).max() < 6 * expected**0.5
    only, there = LiveChunks(table, [i for i in range(12) if i != own]).replace(ids, random.random(ids.shape), np.array(own))
    assert not there.any() and only.shape == ids.shape


def test_deleted_documents_have_no_windows(edited: RetrievalDatabase) -> None:
    source = RETRODataModule(str(edited.folder), num_chunks=2, num_neighbors=2, random_neighbors=0.5)
    rows: Any = source.train_dataloader().dataset
    assert not np.isin(rows.windows.document, edited.manifest["deleted"]).any()
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(again[[0, 1]]["neighbors"].tokens, rows[[0, 1]]["neighbors"].tokens)
    evaluated: Any = source.val_dataloader().dataset
    assert not np.isin(edited.chunks.document_of(evaluated.controls["random"][0]), edited.manifest["deleted"]).any()
