import random

import numpy as np
import pytest

from lightning_align.retrieval.duplicates import BINS, GRAM, find_copies, group_documents, jaccard, shingles, signature


def random_tokens(length, seed):
    return np.random.default_rng(seed).integers(0, 1000, length)


def edited(tokens, share, seed):
    """Make a copy in which a fraction of the tokens is replaced, in one run."""
    copy = tokens.copy()
    length = round(share * len(copy))
    start = random.Random(seed).randrange(len(copy) - length + 1)
    copy[start : start + length] = 1000 + np.arange(length)
    return copy


def exact(first, second):
    """Compute the Jaccard similarity of the sets of 13-grams, with Python sets and no hashes."""
    sets = [{tuple(t[i : i + GRAM].tolist()) for i in range(max(1, len(t) - GRAM + 1))} for t in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_similarity_by_hand():
    # 15 tokens have three 13-grams. Another last token changes one of them: 2 in common, 4 in total.
    one, other = np.arange(15), np.array([*range(14), 99])
    assert jaccard(shingles(one), shingles(other)) == 0.5 == exact(one, other)
    assert jaccard(shingles(one[:5]), shingles(one[:5])) == 1.0
    assert jaccard(shingles(one[:5]), shingles(one[:6])) == 0.0


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_hashed_similarity_equals_exact_similarity(share):
    one = random_tokens(700, 1)
    other = edited(one, share, 2)
    assert jaccard(shingles(one), shingles(other)) == pytest.approx(exact(one, other), abs=1e-12)


def test_signature_agreement_estimates_similarity():
    agreements = []
    for seed in range(40):
        one = random_tokens(900, seed)
        agreements.append(np.mean(signature(one) == signature(edited(one, 0.2, seed))))
    expected = exact(random_tokens(900, 0), edited(random_tokens(900, 0), 0.2, 0))
    # Mean of 40 * BINS draws, tolerance of four standard deviations.
    assert abs(np.mean(agreements) - expected) < 4 * (0.25 / (40 * BINS)) ** 0.5


def test_short_and_empty_documents_have_full_signatures():
    for length in (1, 5, 13, 20):
        assert len(np.unique(signature(random_tokens(length, 0)))) > 1
        assert np.array_equal(signature(random_tokens(length, 0)), signature(random_tokens(length, 0)))
    assert signature(np.array([], dtype=np.int64)).shape == (BINS,)


def test_groups_equal_brute_force():
    runs = [random_tokens(400, seed) for seed in range(30)]
    runs += [edited(runs[i], 0.02, i) for i in range(10)] + [edited(runs[i], 0.6, i) for i in range(10, 20)] + [runs[0]]
    groups = group_documents(np.stack([signature(run) for run in runs]), lambda i: shingles(runs[i]))
    for i, one in enumerate(runs):
        for j, other in enumerate(runs[:i]):
            assert (groups[i] == groups[j]) == (exact(one, other) >= 0.8), (i, j)
    assert groups.tolist()[:30] == list(range(30))  # the number of a group is its first document


def test_copies_are_found_across_tables():
    database = [random_tokens(300, seed) for seed in range(20)]
    queries = [random_tokens(300, 100), edited(database[7], 0.03, 0), database[3]]
    pairs = find_copies(
        np.stack([signature(run) for run in queries]),
        lambda i: shingles(queries[i]),
        np.stack([signature(run) for run in database]),
        lambda i: shingles(database[i]),
        np.arange(20),
    )
    assert [(pair.first, pair.second) for pair in pairs] == [(2, 3), (1, 7)]
    assert pairs[0].similarity == 1.0 and pairs[1].similarity == pytest.approx(exact(queries[1], database[7]))


def test_many_copies_are_grouped_quickly():
    run = random_tokens(5, 0)
    signatures = np.stack([signature(run)] * 2000)
    assert set(group_documents(signatures, lambda _: shingles(run)).tolist()) == {0}
