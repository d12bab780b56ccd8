"""Filters worked by hand, and the distribution of what is drawn."""

import pytest
import torch

from lightning_align.generation.filters import draw, filter_logits

# Probabilities of five tokens, in no order; as logits, with a constant added, which must not matter.
P = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]])
LOGITS = P.log() + 3


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_without_filters_nothing_changes() -> None:
    torch.testing.assert_close(filter_logits(LOGITS), LOGITS, rtol=0, atol=0)


def test_temperature_divides() -> None:
    torch.testing.assert_close(filter_logits(LOGITS, temperature=0.5), LOGITS * 2, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_k_likeliest(top_k: int, expected: list[int]) -> None:
    assert kept(filter_logits(LOGITS, top_k=top_k)) == [expected]


# Sorted: .4, .25, .2, .1, .05; cumulated: .4, .65, .85, .95, 1.
@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.9, [0, 1, 3, 4]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, expected: list[int]) -> None:
    assert kept(filter_logits(LOGITS, top_p=top_p)) == [expected]


# Over the likeliest: .25, 1, .125, .625, .5.
@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.1, [0, 1, 2, 3, 4]), (0.2, [0, 1, 3, 4]), (0.3, [1, 3, 4]), (0.6, [1, 3]), (0.99, [1])]
)
def test_min_p_keeps_what_is_near_the_likeliest(min_p: float, expected: list[int]) -> None:
    assert kept(filter_logits(LOGITS, min_p=min_p)) == [expected]


def test_each_filter_sees_what_the_one_before_left() -> None:
    # Of all five, 0.6 is reached by .4 + .25. Of the top 3, renormalised to .47, .29, .24, also by two; 0.8 by three of the
    # three, but by three of five (.85) as well; 0.7: two of three (.76) against three of five.
    assert kept(filter_logits(LOGITS, top_p=0.7)) == [[1, 3, 4]]
    assert kept(filter_logits(LOGITS, top_k=3, top_p=0.7)) == [[1, 3]]
    # Temperature first: at 0.5 the probabilities are squared, .16, .0625, .04, .01, .0025 over .275; .58 reach .55 alone.
    assert kept(filter_logits(LOGITS, top_p=0.55)) == [[1, 3]]
    assert kept(filter_logits(LOGITS, temperature=0.5, top_p=0.55)) == [[1]]
    assert kept(filter_logits(LOGITS, temperature=0.5, min_p=0.3)) == [[1, 3]]


def test_rows_are_filtered_one_by_one() -> None:
    two = torch.cat([LOGITS, LOGITS.flip(1)])
    assert kept(filter_logits(two, top_p=0.64)) == [[1, 3], [1, 3]]
    assert kept(filter_logits(two, top_k=3)) == [[1, 3, 4], [0, 1, 3]]


def test_what_is_kept_keeps_its_logit() -> None:
    out = filter_logits(LOGITS.bfloat16(), top_k=3, top_p=0.9, min_p=0.1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[out.isfinite()], LOGITS.bfloat16().float()[out.isfinite()], rtol=0, atol=0)


def test_draws_follow_the_distribution() -> None:
    """Chi-square with 3 degrees of freedom over 20,000 draws; 16.3 is exceeded once in 1,000, and the seed is fixed."""
    logits = filter_logits(LOGITS, top_k=4).expand(20_000, -1)
    counts = draw(logits, torch.Generator().manual_seed(0)).bincount(minlength=5)
    assert int(counts[2]) == 0
    expected = 20_000 * P[0] / 0.95
    chi = sum((float(counts[i]) - float(expected[i])) ** 2 / float(expected[i]) for i in (0, 1, 3, 4))
    assert chi < 16.3


def test_a_race_time_of_zero_draws_no_token_that_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert draw(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), None).tolist() == [1]


def test_draws_repeat_with_their_generator() -> None:
    logits = LOGITS.expand(50, -1)
    first, second, other = (draw(logits, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.tolist() == second.tolist() != other.tolist()
