"""Tests of the Markov chain: its rows, its distributions, and the responses that it cannot generate."""

from collections import Counter

import pytest

from lightning_align.data.tasks.markov import END, MarkovChain

SMALL = {"num_symbols": 5, "num_successors": 2, "max_symbols": 6, "end": 0.3}


def test_the_chain_can_generate_its_rows() -> None:
    task = MarkovChain(300, **SMALL)
    rows = list(task.rows())
    assert rows == list(task.rows()) and len(rows) == 300
    assert all(task.grade(row["prompt"], row["response"]) for row in rows)
    assert {len(row["response"]) for row in rows} == set(range(1, 7))
    assert {len(row["prompt"]) for row in rows} == {2}


def test_frequencies_follow_the_distribution() -> None:
    task = MarkovChain(20_000, **SMALL)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in task.rows():
        prompt, symbols = row["prompt"], [*row["response"], END]
        for place in range(2):
            if place < len(symbols):
                counts.setdefault((prompt, row["response"][:place]), Counter())[symbols[place]] += 1
    for (prompt, begun), found in counts.items():
        expected = task.distribution(prompt, begun)
        assert sum(expected.values()) == pytest.approx(1)
        total = found.total()
        chi = sum((found[s] - total * p) ** 2 / (total * p) for s, p in expected.items())
        assert found.keys() <= expected.keys() and chi < 20  # at most 2 degrees of freedom


def test_responses_that_the_chain_cannot_generate_are_wrong() -> None:
    task = MarkovChain(1, **SMALL)
    first = next(iter(task.distribution("ab", "")))
    assert END not in task.distribution("ab", "") and END in task.distribution("ab", first)
    assert task.grade("ab", first)
    assert not task.grade("ab", "")
    assert not task.grade("ab", first + "z")
    long = ""
    while len(long) < 6:
        long += next(s for s in task.distribution("ab", long) if s != END)
    assert task.grade("ab", long) and not task.grade("ab", long + long[-1]) and task.distribution("ab", long) == {END: 1}


def test_splits_seeds_and_chains_differ() -> None:
    tasks = [MarkovChain(50), MarkovChain(50, seed=1), MarkovChain(50, split="test"), MarkovChain(50, chain=1)]
    assert len({str(list(task.rows())) for task in tasks}) == len({task.fingerprint for task in tasks}) == 4
    assert all(tasks[0].grade(row["prompt"], row["response"]) for row in tasks[2].rows())
    assert not all(tasks[0].grade(row["prompt"], row["response"]) for row in tasks[3].rows())


@pytest.mark.parametrize(
    "arguments",
    [{"num_rows": 0}, {"num_symbols": 27}, {"num_successors": 17}, {"end": 1.0}, {"max_symbols": 0}, {"split": "dev"}],
)
def test_wrong_arguments_are_named(arguments: dict[str, object]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        MarkovChain(**arguments)
