"""Exact search on a device: the code runs on the CPU here, and on a pretended GPU."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import faiss
import numpy as np
import pytest
import torch

from lightning_align.retrieval import device_search
from lightning_align.retrieval.dense import DenseSearcher
from lightning_align.retrieval.device_search import DeviceSearch, exact_search, search_device
from lightning_align.retrieval.exact import ExactSearch
from lightning_align.retrieval.neighbors import Forbidden
from lightning_align.runtime.team import Team
from tests.devices.pretended import GPU, PretendedGPU
from tests.retrieval.test_exact import brute_force, case, check

CPU = torch.device("cpu")
MEMORY = ("resident", "tiles", "copied")


def memory_for(kind: str, vectors: Any) -> int:
    """Memory for all vectors in one tile, for all in several tiles, or for tiles that are copied for each search."""
    return {"resident": 1 << 30, "tiles": 3 * vectors.nbytes, "copied": vectors.nbytes}[kind]


def few(num: int, **options: Any) -> Any:
    """A case of `tests.retrieval.test_exact` with its first 60 queries."""
    vectors, groups, queries, forbidden = case(num, **options)
    kept = forbidden.rows < 60
    return vectors, groups, queries[:60], Forbidden(forbidden.rows[kept], forbidden.groups[kept])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("copies", [0, 2])
@pytest.mark.parametrize("spread", [False, True], ids=["runs", "scattered"])
def test_search_on_a_device_equals_brute_force(memory: str, copies: int, spread: bool) -> None:
    vectors, groups, queries, forbidden = few(1300, copies=copies, spread=spread)
    search = DeviceSearch(vectors, groups, device=CPU, memory=memory_for(memory, vectors))
    assert search.resident == (memory != "copied")
    check(search.nearest(queries, 3, forbidden), brute_force(vectors, groups, queries, 3, forbidden))


@pytest.mark.parametrize("memory", MEMORY)
def test_results_are_those_of_the_cpu_where_scores_round_away_the_difference(memory: str) -> None:
    draw = np.random.default_rng(2)
    vectors = (1000 + 0.01 * draw.normal(size=(900, 8))).astype(np.float32)
    vectors[::3] = vectors[0]
    groups, rows = np.arange(900) // 10, np.arange(60)
    forbidden = Forbidden(rows, groups[rows])
    expected = ExactSearch(vectors, groups).nearest(vectors[rows], 4, forbidden)
    found = DeviceSearch(vectors, groups, device=CPU, memory=memory_for(memory, vectors)).nearest(vectors[rows], 4, forbidden)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_slots_without_allowed_vectors_are_masked() -> None:
    vectors, groups = np.eye(6, dtype=np.float32), np.array([-1, -1, 0, 0, 0, 1])
    search = DeviceSearch(vectors, groups, device=CPU)
    forbidden = Forbidden(np.array([0, 0, 1]), np.array([0, 1, 0]))
    found = search.nearest(vectors[:3], 9, forbidden)  # more than there are vectors
    expected = ExactSearch(vectors, groups).nearest(vectors[:3], 9, forbidden)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found.mask.sum(1).tolist() == [0, 1, 4] and found.ids.shape == (3, 9)
    none = np.array([], dtype=np.int64)
    found = search.nearest(vectors[:3], 2, Forbidden(none, none))
    assert found.mask.all() and (groups[found.ids] >= 0).all()


def test_many_forbidden_groups_shrink_the_blocks_and_not_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, groups, queries, forbidden = case(700, copies=2, seed=1, num_groups=200)
    truth = ExactSearch(vectors, groups).nearest(queries, 3, forbidden)
    monkeypatch.setattr(device_search, "TABLE_BYTES", 7 * 200)
    monkeypatch.setattr(device_search, "ROWS", 50)
    found = DeviceSearch(vectors, groups, device=CPU).nearest(queries, 3, forbidden)
    assert all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("memory", MEMORY)
def test_on_a_pretended_gpu_the_results_are_the_same(memory: str) -> None:
    vectors, groups, queries, forbidden = few(500, copies=3, seed=3)
    truth = ExactSearch(vectors, groups).nearest(queries, 3, forbidden)
    with PretendedGPU() as device, torch.autocast("cuda", dtype=torch.bfloat16):
        search = DeviceSearch(vectors, groups, device=GPU, memory=memory_for(memory, vectors))
        found = search.nearest(queries, 3, forbidden)
        assert device.has(search._placed[1]) and (search._placed[0] is None) == (memory == "copied")
    assert all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    vectors, groups, queries, forbidden = case(700, copies=2, seed=1)
    truth = ExactSearch(vectors, groups).nearest(queries, 3, forbidden)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = DeviceSearch(vectors, groups, device=CPU).nearest(queries, 3, forbidden)
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))


def test_tf32_is_off_while_scores_are_computed_and_comes_back() -> None:
    vectors, groups, queries, forbidden = case(100, copies=0)
    seen: list[str] = []
    addmm = torch.addmm

    def spied(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return addmm(*args, **kwargs)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with mock.patch("torch.addmm", spied):
            DeviceSearch(vectors, groups, device=CPU).nearest(queries, 2, forbidden)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen and set(seen) == {"highest"}


def test_an_exact_index_is_searched_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, groups, queries, forbidden = case(400, copies=0, dim=8)
    index = faiss.index_factory(8, "Flat")
    index.add(vectors)
    monkeypatch.setattr(device_search, "DEVICES", ("cpu",))
    on_device = DenseSearcher(index, groups, effort=1, device=CPU)
    assert isinstance(on_device._exact, DeviceSearch)
    monkeypatch.undo()
    for device in (None, CPU, torch.device("mps")):
        assert type(exact_search(vectors, groups, device)) is ExactSearch
    expected = DenseSearcher(index, groups, effort=1).nearest(queries, 3, forbidden)
    assert all(np.array_equal(a, b) for a, b in zip(on_device.nearest(queries, 3, forbidden), expected, strict=True))


@pytest.mark.parametrize(
    ("first", "own", "expected"),
    [("cuda", "cuda:1", "cuda:1"), ("cpu", "cuda:1", None), ("cuda", "cpu", None), ("mps", "mps", None)],
)
def test_rank_0_decides_where_all_ranks_search(first: str, own: str, expected: str | None) -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(own)))
    team = Team()
    with mock.patch.object(team, "share", lambda value: first), mock.patch("torch.accelerator.is_available", lambda: True):
        assert search_device(lambda: trainer, team) == (None if expected is None else torch.device(expected))


def test_without_an_accelerator_no_trainer_is_made() -> None:
    with mock.patch("torch.accelerator.is_available", lambda: False):
        assert search_device(lambda: pytest.fail("made a trainer"), Team()) is None


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [*MEMORY, "chosen"])
def test_on_a_gpu_the_results_are_the_same(memory: str) -> None:
    vectors, groups, queries, forbidden = case(20_000, copies=3, dim=96, num_groups=900)
    truth = ExactSearch(vectors, groups).nearest(queries, 5, forbidden)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            search = DeviceSearch(
                vectors,
                groups,
                device=torch.device("cuda", 0),
                memory=None if memory == "chosen" else memory_for(memory, vectors),
            )
            found = search.nearest(queries, 5, forbidden)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))
