import random

import numpy as np
import pytest

from lightning_align.retrieval.duplicates import (
    BINS,
    KEPT,
    RATE,
    WINDOW,
    group_documents,
    jaccard,
    letters,
    shingles,
    signature,
    sketch,
)


def random_text(length, seed):
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(length))


def edited(text, share, seed):
    """Make a copy in which a fraction of the words is replaced, in one run."""
    copy = text.split()
    length = round(share * len(copy))
    start = random.Random(seed).randrange(len(copy) - length + 1)
    copy[start : start + length] = (f"other{i}" for i in range(length))
    return " ".join(copy)


def grams(text):
    run = text.replace(" ", "")
    return {run[i : i + WINDOW] for i in range(len(run) - WINDOW + 1)}


def exact(first, second):
    """Compute the Jaccard similarity of the sets of strings, with Python sets and no hashes."""
    sets = grams(first), grams(second)
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def sketch_of(text):
    return sketch(shingles(text))


def test_similarity_by_hand():
    # 34 letters have three shingles. Another last letter changes one of them: 2 in common, 4 in total.
    one = "abcdefghijklmnopqrstuvwxyz01234567"
    assert len(one) == WINDOW + 2
    assert jaccard(sketch_of(one), sketch_of(one[:-1] + "9")) == 0.5
    assert jaccard(sketch_of(one[:5]), sketch_of(one[:5])) == 1.0
    assert jaccard(sketch_of(one[:5]), sketch_of(one[:6])) == 0.0


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Größe  x\n\ty", "GRÖSSE X Y"),
        ("e\u0301a", "\u00e9a"),
        ("a\r\nb", "a b"),
        ("\ufeffab", "ab"),
        ("\ufb01x \uff21", "fix a"),
        ("a_b.c", "ABC"),
        ("東京\u3000都", "東京都"),
        ("so\u00adft", "soft"),
    ],
)
def test_letters_are_of_one_form(text, same):
    assert letters(text).tolist() == letters(same).tolist() == [ord(c) for c in same.casefold() if c.isalnum()]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_hashed_similarity_equals_exact_similarity(share):
    one = random_text(45, 1)
    other = edited(one, share, 2)
    assert len(sketch_of(one).hashes) == len(grams(one)) <= KEPT
    assert jaccard(sketch_of(one), sketch_of(other)) == pytest.approx(exact(one, other), abs=1e-12)


def test_sketches_of_long_documents_estimate_the_similarity():
    for seed, share in enumerate((0.0, 0.1, 0.3, 0.6)):
        one = random_text(5000, seed)
        other = edited(one, share, seed)
        kept = sketch_of(one)
        assert len(grams(one)) / RATE * 0.8 < len(kept.hashes) < len(grams(one)) / RATE * 1.2
        assert kept.hashes.max() <= kept.limit
        # About 1600 hashes, so four standard errors are 0.05.
        assert jaccard(kept, sketch_of(other)) == pytest.approx(exact(one, other), abs=0.05)


def test_signature_agreement_estimates_similarity():
    agreements = []
    for seed in range(40):
        one = random_text(200, seed)
        agreements.append(np.mean(signature(shingles(one)) == signature(shingles(edited(one, 0.2, seed)))))
    expected = exact(random_text(200, 0), edited(random_text(200, 0), 0.2, 0))
    # Mean of 40 * BINS draws, tolerance of four standard deviations.
    assert abs(np.mean(agreements) - expected) < 4 * (0.25 / (40 * BINS)) ** 0.5


def test_short_and_empty_documents_have_full_signatures():
    for length in (1, 5, 13, 20):
        assert len(np.unique(signature(shingles(random_text(length, 0))))) > 1
        assert np.array_equal(signature(shingles(random_text(length, 0))), signature(shingles(random_text(length, 0))))
    assert signature(shingles("")).shape == signature(shingles("... --- ...")).shape == (BINS,)
    assert shingles("...") != shingles("---")


def test_groups_equal_brute_force():
    runs = [random_text(300, seed) for seed in range(30)]
    runs += [edited(runs[i], 0.02, i) for i in range(10)] + [edited(runs[i], 0.6, i) for i in range(10, 20)] + [runs[0].upper()]
    groups = group_documents(np.stack([signature(shingles(run)) for run in runs]), lambda i: sketch_of(runs[i]))
    sets = [grams(run.lower()) for run in runs]
    for i, one in enumerate(sets):
        for j, other in enumerate(sets[:i]):
            assert (groups[i] == groups[j]) == (len(one & other) >= 0.8 * len(one | other)), (i, j)
    assert groups.tolist()[:30] == list(range(30))  # the number of a group is its first document


def test_many_copies_are_grouped_quickly():
    run = random_text(5, 0)
    signatures = np.stack([signature(shingles(run))] * 2000)
    assert set(group_documents(signatures, lambda _: sketch_of(run)).tolist()) == {0}
