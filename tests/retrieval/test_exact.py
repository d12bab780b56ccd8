import faiss
import numpy as np
import pytest
import torch

from lightning_align.retrieval import exact
from lightning_align.retrieval.dense import DenseSearcher
from lightning_align.retrieval.exact import ExactSearch
from lightning_align.retrieval.faiss_seam import flat_vectors
from lightning_align.retrieval.neighbors import Forbidden


def brute_force(vectors, groups, queries, k, forbidden):
    """Find the nearest of each query in a loop, in order of distance in float64, then number."""
    pairs = set(zip(forbidden.rows.tolist(), forbidden.groups.tolist(), strict=True))
    ids, distances = np.zeros((len(queries), k), dtype=np.int64), np.full((len(queries), k), np.inf)
    for row, query in enumerate(queries.astype(np.float64)):
        far = np.square(vectors.astype(np.float64) - query).sum(1)
        allowed = [i for i in range(len(vectors)) if groups[i] >= 0 and (row, groups[i]) not in pairs]
        best = sorted(allowed, key=lambda i: (far[i], i))[:k]
        ids[row, : len(best)], distances[row, : len(best)] = best, far[best]
    return ids, distances


def check(found, truth):
    ids, distances = truth
    assert np.array_equal(found.ids, ids)
    assert np.array_equal(found.mask, np.isfinite(distances))
    assert np.array_equal(found.distances, distances.astype(np.float32))


def case(num, *, copies, seed=0, dim=12, num_groups=30, spread=False):
    """Make vectors of documents. Every `copies`-th is a copy of one of three vectors."""
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(num, dim)).astype(np.float16).astype(np.float32)
    if copies:
        vectors[::copies] = vectors[draw.integers(0, 3, len(vectors[::copies]))]
    groups = draw.integers(-1, num_groups, num) if spread else np.sort(draw.integers(-1, num_groups, num))
    rows = draw.integers(0, num, 300)
    pairs = {(row, int(groups[q])) for row, q in enumerate(rows) if groups[q] >= 0} | {(row, 3) for row in range(0, 300, 7)}
    forbidden = Forbidden(*np.array(sorted(pairs)).T)
    return vectors, groups, vectors[rows], forbidden


@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("copies", [0, 2])
@pytest.mark.parametrize("spread", [False, True], ids=["runs", "scattered"])
def test_exact_search_equals_brute_force(k, copies, spread):
    vectors, groups, queries, forbidden = case(1300, copies=copies, spread=spread)
    found = ExactSearch(vectors, groups).nearest(queries, k, forbidden)
    check(found, brute_force(vectors, groups, queries, k, forbidden))


@pytest.mark.parametrize("rows, columns, width", [(7, 16, 4), (300, 33, 8), (64, 1024, 128)])
def test_result_does_not_depend_on_tiles_batches_or_threads(monkeypatch, rows, columns, width):
    vectors, groups, queries, forbidden = case(700, copies=2, seed=1)
    truth = ExactSearch(vectors, groups).nearest(queries, 3, forbidden)
    for name, value in (("ROWS", rows), ("COLUMNS", columns), ("WIDTH", width), ("FEW", 8), ("PAIRS", 5)):
        monkeypatch.setattr(exact, name, value)
    search, threads = ExactSearch(vectors, groups), torch.get_num_threads()
    for many in (1, 2):
        torch.set_num_threads(many)
        try:
            whole = search.nearest(queries, 3, forbidden)
            assert torch.get_num_threads() == many
        finally:
            torch.set_num_threads(threads)
        for one, other in zip(whole, truth, strict=True):
            assert np.array_equal(one, other)
    for start in range(0, 300, 77):
        mine = (forbidden.rows >= start) & (forbidden.rows < start + 77)
        part = search.nearest(queries[start : start + 77], 3, Forbidden(forbidden.rows[mine] - start, forbidden.groups[mine]))
        assert all(np.array_equal(one, other[start : start + 77]) for one, other in zip(part, truth, strict=True))


def test_neighbors_are_correct_where_scores_round_away_the_difference():
    # Far from the origin the error of a float32 score exceeds the differences between the neighbors.
    draw = np.random.default_rng(2)
    vectors = (1000 + 0.01 * draw.normal(size=(900, 8))).astype(np.float32)
    groups, none = np.zeros(900, dtype=np.int64), np.array([], dtype=np.int64)
    found = ExactSearch(vectors, groups).nearest(vectors[:50], 4, Forbidden(none, none))
    check(found, brute_force(vectors, groups, vectors[:50], 4, Forbidden(none, none)))
    assert found.ids[:, 0].tolist() == list(range(50))


def test_ties_return_the_lowest_numbers():
    vectors = np.ones((5000, 4), dtype=np.float32)
    groups = np.arange(5000) // 10
    rows = np.arange(300)
    found = ExactSearch(vectors, groups).nearest(vectors[rows], 2, Forbidden(rows, groups[rows]))
    assert found.ids[:10].tolist() == [[10, 11]] * 10 and found.ids[10:].tolist() == [[0, 1]] * 290
    assert found.mask.all() and not found.distances.any()


def test_slots_without_allowed_vectors_are_masked():
    vectors, groups = np.eye(6, dtype=np.float32), np.array([-1, -1, 0, 0, 0, 1])
    search = ExactSearch(vectors, groups)
    found = search.nearest(vectors[:3], 4, Forbidden(np.array([0, 0, 1]), np.array([0, 1, 0])))
    assert found.mask.sum(1).tolist() == [0, 1, 4] and found.ids[0].tolist() == [0] * 4 and found.ids[1, 0] == 5
    assert np.isinf(found.distances[~found.mask]).all()


def test_only_flat_indexes_are_searched_exactly(tmp_path):
    vectors, groups, queries, forbidden = case(600, copies=0, dim=8)
    index = faiss.index_factory(8, "Flat")
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "i"))
    mapped = faiss.read_index(str(tmp_path / "i"), faiss.IO_FLAG_MMAP_IFC)
    assert np.array_equal(flat_vectors(mapped), vectors)
    truth = brute_force(vectors, groups, queries, 3, forbidden)
    for some in (index, mapped):
        check(DenseSearcher(some, groups, effort=1).nearest(queries, 3, forbidden), truth)
    for factory, metric in (("Flat", faiss.METRIC_INNER_PRODUCT), ("SQ8", faiss.METRIC_L2), ("IDMap,Flat", faiss.METRIC_L2)):
        assert flat_vectors(faiss.index_factory(8, factory, metric)) is None
