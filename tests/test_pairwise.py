"""Pairwise losses against numbers worked by hand and against independent formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.pairwise import LOSSES, LossName, Ratios, check_loss, log_ratios, pair_metrics, split_pairs
from lightning_align.types import LogProbs


def ratios(chosen: float = 3.0, rejected: float = -1.0, lengths: tuple[int, int] = (2, 4)) -> Ratios:
    return Ratios(
        *(torch.tensor([v], dtype=torch.float64) for v in (chosen, rejected)), *map(torch.tensor, ([n] for n in lengths))
    )


# r_w = 3 over 2 tokens, r_l = -1 over 4: delta 4, mean delta 1.5 + 0.25 = 1.75.
# -log s(2) = log(1 + e^-2) = 0.126928; -log s(-2) = 2.126928; at b = 2, b * 1.75 = 3.5: log(1 + e^-3.5) = 0.029750.
BY_HAND: list[tuple[LossName, float, float, float]] = [
    ("sigmoid", 0.5, 0.0, 0.126928),
    ("sigmoid", 0.5, 0.1, 0.9 * 0.126928 + 0.1 * 2.126928),
    ("sigmoid_norm", 2.0, 0.0, 0.029750),
    ("sigmoid_norm", 2.0, 0.2, 0.8 * 0.029750 + 0.2 * 3.529750),
    ("hinge", 0.5, 0.0, 0.0),
    ("hinge", 0.1, 0.0, 0.6),
    ("ipo", 0.5, 0.0, 0.75**2),
    ("ipo", 0.1, 0.0, 3.25**2),
    ("robust", 0.5, 0.0, 0.126928),
    ("robust", 0.5, 0.1, (0.9 * 0.126928 - 0.1 * 2.126928) / 0.8),
]


@pytest.mark.parametrize(("loss", "beta", "smoothing", "expected"), BY_HAND)
def test_by_hand(loss: LossName, beta: float, smoothing: float, expected: float) -> None:
    value = LOSSES[loss](ratios(), beta=beta, label_smoothing=smoothing)
    assert float(value) == pytest.approx(expected, abs=2e-6)


def slow(loss: str, w: float, l: float, nw: int, nl: int, b: float, e: float) -> float:  # noqa: E741  # as in the papers
    def nls(x: float) -> float:
        """-log sigmoid(x), where exp cannot overflow."""
        return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))

    d = w / nw - l / nl if loss in ("sigmoid_norm", "ipo") else w - l
    match loss:
        case "hinge":
            return max(0.0, 1 - b * d)
        case "ipo":
            return (d - 0.5 / b) ** 2
        case "robust":
            return ((1 - e) * nls(b * d) - e * nls(-b * d)) / (1 - 2 * e)
        case _:
            return (1 - e) * nls(b * d) + e * nls(-b * d)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_thousand_random_inputs(loss: LossName) -> None:
    w, l = (torch.randn(1000, dtype=torch.float64) * 100 for _ in range(2))  # noqa: E741
    nw, nl = (torch.randint(1, 50, (1000,)) for _ in range(2))
    b, e = 0.3, 0.0 if loss in ("hinge", "ipo") else 0.15
    values = LOSSES[loss](Ratios(w, l, nw, nl), beta=b, label_smoothing=e)
    expected = [slow(loss, *row, b, e) for row in zip(w.tolist(), l.tolist(), nw.tolist(), nl.tolist(), strict=True)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, math.log(2)),
        ("sigmoid", 0.3, math.log(2)),
        ("sigmoid_norm", 0.0, math.log(2)),
        ("hinge", 0.0, 1.0),
        ("ipo", 0.0, 25.0),
        ("robust", 0.2, math.log(2)),
    ],
)
def test_at_the_reference(loss: LossName, smoothing: float, expected: float) -> None:
    """Policy and reference equal: every ratio is 0."""
    value = LOSSES[loss](ratios(0, 0), beta=0.1, label_smoothing=smoothing)
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_ipo_is_least_at_its_target() -> None:
    beta = 0.25
    delta = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    one = torch.ones(1001, dtype=torch.long)
    values = LOSSES["ipo"](Ratios(delta, torch.zeros_like(delta), one, one), beta=beta, label_smoothing=0.0)
    assert float(delta[values.argmin()]) == pytest.approx(1 / (2 * beta))
    assert float(values.min()) == pytest.approx(0, abs=1e-20)


def test_the_gradient_is_that_of_the_paper() -> None:
    """d loss / d r_w = -b s(-b d): a pair that the policy has wrong pulls harder (equation 7's gradient)."""
    for delta in (-30.0, -1.0, 0.0, 2.0):
        chosen = torch.tensor([delta], dtype=torch.float64, requires_grad=True)
        one = torch.ones(1, dtype=torch.long)
        LOSSES["sigmoid"](Ratios(chosen, torch.zeros(1), one, one), beta=0.2, label_smoothing=0.0).sum().backward()
        assert chosen.grad is not None
        assert float(chosen.grad) == pytest.approx(-0.2 / (1 + math.exp(0.2 * delta)), rel=1e-6)


def test_sums_and_means_agree_where_lengths_are_equal() -> None:
    """b on means equals b / L on sums."""
    r = ratios(lengths=(8, 8))
    torch.testing.assert_close(
        LOSSES["sigmoid_norm"](r, beta=4.0, label_smoothing=0.0), LOSSES["sigmoid"](r, beta=0.5, label_smoothing=0.0)
    )


def test_extreme_ratios_stay_finite() -> None:
    for loss in LOSSES:
        for sign in (1, -1):
            assert bool(LOSSES[loss](ratios(1e4 * sign, -1e4 * sign), beta=10.0, label_smoothing=0.0).isfinite())


def test_an_empty_response_divides_by_nothing() -> None:
    assert float(ratios(0, 2, (0, 4)).mean_delta) == -0.5


@pytest.mark.parametrize(
    ("loss", "values", "message"),
    [
        ("dpo", {}, "loss is 'dpo'; it must be one of sigmoid, sigmoid_norm, hinge, ipo, robust"),
        ("sigmoid", {"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ("sigmoid", {"beta": math.nan}, "beta is nan"),
        ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ("robust", {"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ("ipo", {"label_smoothing": 0.1}, "the ipo loss has none"),
        ("hinge", {"label_smoothing": 0.1}, "the hinge loss has none"),
    ],
)
def test_what_a_loss_cannot_use_is_refused(loss: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_loss(loss, **{"beta": 0.1, "label_smoothing": 0.0, **values})


@pytest.mark.parametrize("loss", LOSSES)
def test_what_it_can_use_is_not(loss: str) -> None:
    check_loss(loss, beta=0.1, label_smoothing=0.0)


def logprobs(*sums: float) -> LogProbs:
    return LogProbs(torch.tensor(sums), torch.arange(1, len(sums) + 1))


def test_the_first_half_is_chosen() -> None:
    chosen, rejected = split_pairs(logprobs(1.0, 2.0, 3.0, 4.0))
    assert (chosen.sums.tolist(), rejected.sums.tolist()) == ([1, 2], [3, 4])
    assert (chosen.counts.tolist(), rejected.counts.tolist()) == ([1, 2], [3, 4])


def test_metrics_by_hand() -> None:
    policy, reference = logprobs(-1.0, -2.0, -6.0, -3.0), logprobs(-3.0, -4.0, -4.0, -8.0)
    r = log_ratios(policy, reference)
    # Pair 0: r_w = -1 + 3 = 2, r_l = -6 + 4 = -2. Pair 1: r_w = 2, r_l = 5, so the rejected one is preferred.
    assert (r.chosen.tolist(), r.rejected.tolist()) == ([2, 2], [-2, 5])
    metrics = pair_metrics(policy, r, beta=0.5)

    def values(name: str) -> list[float]:
        tensor: Tensor = metrics[name]
        return tensor.tolist()

    assert values("rewards/chosen") == [1.0, 1.0]
    assert values("rewards/rejected") == [-1.0, 2.5]
    assert values("rewards/margins") == [2.0, -1.5]
    assert values("rewards/accuracies") == [1.0, 0.0]
    assert values("logps/chosen") == [-1.0, -2.0]
    assert values("logps/rejected") == [-6.0, -3.0]


def test_a_tie_is_no_success() -> None:
    metrics = pair_metrics(logprobs(-1.0, -1.0), log_ratios(logprobs(-1.0, -1.0), logprobs(-1.0, -1.0)), beta=1.0)
    assert metrics["rewards/accuracies"].tolist() == [0.0]


def test_metrics_carry_no_gradient() -> None:
    sums = torch.zeros(2, requires_grad=True)
    policy = LogProbs(sums, torch.ones(2, dtype=torch.long))
    metrics = pair_metrics(policy, log_ratios(policy, policy), beta=1.0)
    assert not any(value.requires_grad for value in metrics.values())
