"""Tests of the overlap of chunks with their neighbors."""

import random

import numpy as np

from lightning_align.retro.overlap import longest_common_run


def slow(a: list[int], b: list[int]) -> int:
    runs = [b[i:j] for i in range(len(b)) for j in range(i + 1, len(b) + 1)]
    return max((len(run) for run in runs for i in range(len(a)) if a[i : i + len(run)] == run), default=0)


def test_values_computed_by_hand() -> None:
    a, b = np.array([1, 2, 3, 9, 5]), np.array([[7, 2, 3, 9, 6], [5, 5, 5, 1, 2], [8, 8, 8, 8, 8]])
    runs = longest_common_run(np.broadcast_to(a, b.shape), np.ones(b.shape, bool), b, np.ones(b.shape, bool))
    assert runs.tolist() == [3, 2, 0]


def test_equals_brute_force() -> None:
    random.seed(0)
    for _ in range(200):
        a, b = (random.choices(range(3), k=random.randint(1, 9)) for _ in range(2))
        got = longest_common_run(np.array(a), np.ones(len(a), bool), np.array(b), np.ones(len(b), bool))
        assert int(got) == slow(a, b)


def test_padding_does_not_match() -> None:
    a = np.array([4, 4, 0, 0])
    mask = np.array([True, True, False, False])
    assert int(longest_common_run(a, mask, a, mask)) == 2
    assert int(longest_common_run(a, mask, a, np.zeros(4, bool))) == 0
