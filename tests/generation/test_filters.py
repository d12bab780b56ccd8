"""Filters checked by hand, and the distribution of the drawn tokens."""

import pytest
import torch

from lightning_align.generation.filters import choose, draw, filter_logits, num_draws
from lightning_align.generation.noise import uniforms
from lightning_align.generation.sampler import GenerationConfig

# Unsorted probabilities of five tokens. The logits have an added constant, which must not matter.
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
def test_top_k_keeps_the_k_most_likely(top_k: int, expected: list[int]) -> None:
    assert kept(filter_logits(LOGITS, top_k=top_k)) == [expected]


# Sorted: .4, .25, .2, .1, .05. Cumulative: .4, .65, .85, .95, 1.
@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.9, [0, 1, 3, 4]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, expected: list[int]) -> None:
    assert kept(filter_logits(LOGITS, top_p=top_p)) == [expected]


# Divided by the largest probability: .25, 1, .125, .625, .5.
@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.1, [0, 1, 2, 3, 4]), (0.2, [0, 1, 3, 4]), (0.3, [1, 3, 4]), (0.6, [1, 3]), (0.99, [1])]
)
def test_min_p_keeps_tokens_near_the_most_likely(min_p: float, expected: list[int]) -> None:
    assert kept(filter_logits(LOGITS, min_p=min_p)) == [expected]


def test_each_filter_acts_on_the_result_of_the_previous_filter() -> None:
    # Over all five tokens, three reach 0.7 (.85). Over the top 3, renormalized to .47, .29, .24, two reach it (.76).
    assert kept(filter_logits(LOGITS, top_p=0.7)) == [[1, 3, 4]]
    assert kept(filter_logits(LOGITS, top_k=3, top_p=0.7)) == [[1, 3]]
    # Temperature comes first. At 0.5 the squared probabilities are .16, .0625, .04, .01, .0025, divided by .275. So the first
    # token (.58) alone reaches .55.
    assert kept(filter_logits(LOGITS, top_p=0.55)) == [[1, 3]]
    assert kept(filter_logits(LOGITS, temperature=0.5, top_p=0.55)) == [[1]]
    assert kept(filter_logits(LOGITS, temperature=0.5, min_p=0.3)) == [[1, 3]]


# Information -log P: 2.30, 0.92, 3.00, 1.39, 1.61. The entropy is 1.4150, so the distances are .89, .50, 1.58, .03, .19.
@pytest.mark.parametrize(
    ("typical_p", "expected"),
    [(0.2, [3]), (0.26, [3, 4]), (0.44, [3, 4]), (0.46, [1, 3, 4]), (0.84, [1, 3, 4]), (0.86, [0, 1, 3, 4])],
)
def test_typical_p_keeps_tokens_whose_information_is_near_the_entropy(typical_p: float, expected: list[int]) -> None:
    assert kept(filter_logits(LOGITS, typical_p=typical_p)) == [expected]


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.6}, {"top_k": 40}, {"top_p": 0.9, "min_p": 0.01}])
@pytest.mark.parametrize("typical_p", [0.1, 0.5, 0.9, 0.99])
def test_typical_p_equals_that_of_transformers_behind_the_other_filters(filters: dict[str, float], typical_p: float) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    logits = 3 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    theirs = transformers.TypicalLogitsWarper(typical_p)(None, filter_logits(logits, **filters))
    torch.testing.assert_close(filter_logits(logits, **filters, typical_p=typical_p), theirs, rtol=0, atol=0)


def test_rows_are_filtered_one_by_one() -> None:
    two = torch.cat([LOGITS, LOGITS.flip(1)])
    assert kept(filter_logits(two, top_p=0.64)) == [[1, 3], [1, 3]]
    assert kept(filter_logits(two, top_k=3)) == [[1, 3, 4], [0, 1, 3]]


def test_kept_tokens_keep_their_logits() -> None:
    out = filter_logits(LOGITS.bfloat16(), top_k=3, top_p=0.9, min_p=0.1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[out.isfinite()], LOGITS.bfloat16().float()[out.isfinite()], rtol=0, atol=0)


def test_equally_likely_tokens_are_kept_or_removed_together() -> None:
    assert kept(filter_logits(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), top_p=0.5)) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-24, 4)])
def test_a_draw_is_where_the_cumulative_sum_passes_the_share(uniform: float, token: int) -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0]])
    assert draw(weights, torch.tensor([uniform])).tolist() == [token]


@pytest.mark.parametrize("vocabulary", [1, 256, 257, 1000])
def test_a_draw_over_blocks_equals_a_draw_over_one_sum(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(400, vocabulary, generator=generator) * (torch.rand(400, vocabulary, generator=generator) > 0.5)
    weights[:, 0] += 1e-3
    uniform = torch.rand(400, generator=generator)
    sums = weights.double().cumsum(1)
    expected = (sums <= uniform[:, None] * sums[:, -1:]).sum(1)
    found = draw(weights, uniform)
    assert int((found != expected).sum()) <= 1  # a bound may be within rounding of a sum
    assert bool((weights.gather(1, found[:, None]) > 0).all())


FILTERS = [
    {"temperature": 0.7, "top_p": 0.9},
    {"top_p": 0.05},
    {"top_k": 3, "top_p": 0.7},
    {"min_p": 0.3},
    {"typical_p": 0.5},
    {"temperature": 0.8, "top_k": 4, "typical_p": 0.6},
    {"temperature": 0.5, "top_k": 4, "top_p": 0.95, "min_p": 0.1},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_chosen_tokens_follow_the_filtered_distribution(filters: dict[str, float]) -> None:
    """Chi-square over 20,000 draws with at most 4 degrees of freedom. 20.5 is exceeded less than once in 2,000."""
    config = GenerationConfig(**filters)
    noise = uniforms([(7,)], positions=20_000, draws=num_draws(config))[0]
    tokens, logprobs = choose(LOGITS.expand(20_000, -1), noise, config)
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    expected = 20_000 * filter_logits(LOGITS, **{n: getattr(config, n) for n in names}).softmax(1)[0]
    counts = tokens.bincount(minlength=5)
    assert bool((counts[expected == 0] == 0).all())
    chi = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert float(chi) < 20.5
    # The log-probs are of the model, before filtering.
    torch.testing.assert_close(logprobs, P.log()[0][tokens], rtol=0, atol=1e-6)


def test_the_greedy_choice_and_its_logprob() -> None:
    tokens, logprobs = choose(LOGITS, torch.empty(1, 0), GenerationConfig(temperature=0))
    assert tokens.tolist() == [1]
    assert float(logprobs) == pytest.approx(float(torch.tensor(0.4).log()), abs=1e-6)


def test_noise_depends_only_on_its_key_and_position() -> None:
    whole = uniforms([(0, 1), (0, 2), (1, 1)], positions=50, draws=3)
    assert torch.equal(uniforms([(0, 2)], positions=7, draws=3)[0], whole[1, :7])
    assert len({tuple(row) for row in whole.flatten(1).tolist()}) == 3
    assert 0 <= float(whole.min()) and float(whole.max()) < 1
    many = uniforms([(3,)], positions=40_000, draws=1).flatten()
    assert float(many.mean()) == pytest.approx(0.5, abs=0.006)
    assert float(((many[1:] - 0.5) * (many[:-1] - 0.5)).mean()) == pytest.approx(0, abs=0.0013)
