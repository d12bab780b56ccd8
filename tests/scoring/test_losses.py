"""Pairwise losses against values computed by hand and against an independent implementation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.scoring.losses import (
    IN_DELTA,
    LOSSES,
    REFERENCE_FREE,
    SMOOTHED,
    LossName,
    check_loss,
    discopop_loss,
    dpop_loss,
    orpo_loss,
)
from lightning_align.scoring.ratios import Ratios


def ratios(chosen: float = 3.0, rejected: float = -1.0, lengths: tuple[int, int] = (2, 4), policy_delta: float = 5.0) -> Ratios:
    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    return Ratios(one(chosen), one(rejected), *map(torch.tensor, ([n] for n in lengths)), one(policy_delta))


# r_w = 3 over 2 tokens, r_l = -1 over 4: delta 4, mean delta 1.5 + 0.25 = 1.75.
# -log s(2) = log(1 + e^-2) = 0.126928; -log s(-2) = 2.126928; at b = 2, b * 1.75 = 3.5: log(1 + e^-3.5) = 0.029750.
# s(2) = 0.880797, s(-2) = 0.119203; b = 0.5: b r_w = 1.5, b r_l = -0.5; -log s(1.5) = 0.201413, -log s(-1.5) = 1.701413,
# -log s(0.5) = 0.474077, s(-1.5) = 0.182426, s(-0.5) = 0.377541, s(1.5) = 0.817574.
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
    # log 0.9 = -0.105361, log 0.1 = -2.302585.
    ("exo_pair", 0.5, 0.1, 0.880797 * (-0.126928 + 0.105361) + 0.119203 * (-2.126928 + 2.302585)),
    ("nca_pair", 0.5, 0.0, 0.201413 + (1.701413 + 0.474077) / 2),
    ("bco_pair", 0.5, 0.0, 0.201413 + 0.474077),
    ("sppo_hard", 0.5, 0.0, 2.0**2 + 0.0**2),
    ("sppo_hard", 0.25, 0.0, 1.0**2 + 1.0**2),
    # One pair sorts to itself: 5 under the policy, 5 - 4 under the reference.
    ("aot", 0.5, 0.0, 0.126928),
    ("aot_unpaired", 0.5, 0.1, 0.9 * 0.126928 + 0.1 * 2.126928),
    ("apo_zero", 0.5, 0.0, 0.182426 + 0.377541),
    ("apo_down", 0.5, 0.0, 0.817574 + 0.119203),
    # m = s(2 / 0.05) = 1, so exp(-2).
    ("discopop", 0.5, 0.0, 0.135335),
    ("dpop", 0.5, 0.0, 0.126928),
    # 2 * 1.75 - 1 = 2.5: log(1 + e^-2.5).
    ("simpo", 2.0, 0.0, 0.078889),
    ("cpo", 0.5, 0.0, 0.126928),
    ("exponential", 0.5, 0.0, 0.135335),
    ("correlation", 0.5, 0.0, -1.0),
    ("correlation", 0.1, 0.0, 0.6),
]


@pytest.mark.parametrize(("loss", "beta", "smoothing", "expected"), BY_HAND)
def test_values_by_hand(loss: LossName, beta: float, smoothing: float, expected: float) -> None:
    value = LOSSES[loss](ratios(), beta=beta, label_smoothing=smoothing)
    assert float(value) == pytest.approx(expected, abs=2e-6)


def test_values_by_hand_with_further_arguments() -> None:
    # A chosen response that is less likely by 2 than under the reference: b (d - c 2) = 0.5 (1 - 5 * 2) = -4.5: log(1 + e^4.5).
    assert float(dpop_loss(ratios(-2.0, -3.0), beta=0.5, penalty=5.0)) == pytest.approx(4.511048, abs=2e-6)
    # Probabilities per token of 1/2 and 1/5: odds 1 and 1/4, so 0.1 log(1 + 1/4).
    value = orpo_loss(ratios(2 * math.log(0.5), 4 * math.log(0.2)), beta=0.1)
    assert float(value) == pytest.approx(0.1 * math.log(1.25), abs=1e-9)
    # b d = -0.05, t = 0.05: m = s(-1) = 0.268941; 0.731059 * log(1 + e^0.05) + 0.268941 * e^0.05.
    value = discopop_loss(ratios(0.0, 0.5), beta=0.1)
    assert float(value) == pytest.approx(0.731059 * 0.718460 + 0.268941 * 1.051271, abs=2e-6)


def nls(x: float) -> float:
    """Compute -log sigmoid(x) without overflow of exp."""
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def sig(x: float) -> float:
    return math.exp(-nls(x))


def slow(loss: str, w: float, l: float, nw: int, nl: int, b: float, e: float) -> float:  # noqa: E741  # as in the papers
    d = w / nw - l / nl if loss in ("sigmoid_norm", "ipo", "simpo") else w - l
    match loss:
        case "hinge":
            return max(0.0, 1 - b * d)
        case "ipo":
            return (d - 0.5 / b) ** 2
        case "robust":
            return ((1 - e) * nls(b * d) - e * nls(-b * d)) / (1 - 2 * e)
        case "exo_pair":
            p, q = sig(b * d), sig(-b * d)
            return p * (-nls(b * d) - math.log(1 - e)) + q * (-nls(-b * d) - math.log(e))
        case "nca_pair":
            return nls(b * w) + 0.5 * nls(-b * w) + 0.5 * nls(-b * l)
        case "bco_pair":
            return nls(b * w) + nls(-b * l)
        case "sppo_hard":
            return (w - 0.5 / b) ** 2 + (l + 0.5 / b) ** 2
        case "apo_zero":
            return sig(-b * w) + sig(b * l)
        case "apo_down":
            return sig(b * w) + sig(-b * d)
        case "discopop":
            m = sig(b * d / 0.05)
            return (1 - m) * nls(b * d) + (m * math.exp(-b * d) if m > 1e-300 else 0.0)
        case "dpop":
            d -= 50 * max(0.0, -w)
        case "simpo":
            d -= 1 / b
        case "exponential":
            return math.exp(min(80.0, -b * d))
        case "correlation":
            return 1 - b * d
        case "orpo":
            odds = [x / n - math.log(-math.expm1(x / n)) for x, n in ((w, nw), (l, nl))]
            return b * nls(odds[0] - odds[1])
    return (1 - e) * nls(b * d) + e * nls(-b * d)


def smoothing_of(loss: str, share: float) -> float:
    return share if loss in SMOOTHED else 0.0


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"aot", "aot_unpaired"}))
def test_random_inputs_equal_the_slow_version(loss: LossName) -> None:
    w, l = (torch.randn(1000, dtype=torch.float64) * 100 for _ in range(2))  # noqa: E741
    if loss in REFERENCE_FREE:
        w, l = -w.abs(), -l.abs()  # noqa: E741  # log-probs
    nw, nl = (torch.randint(1, 50, (1000,)) for _ in range(2))
    b, e = 0.3, smoothing_of(loss, 0.15)
    values = LOSSES[loss](Ratios(w, l, nw, nl), beta=b, label_smoothing=e)
    expected = [slow(loss, *row, b, e) for row in zip(w.tolist(), l.tolist(), nw.tolist(), nl.tolist(), strict=True)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_aot_compares_quantiles() -> None:
    """Policy deltas 3, 1, 2 and reference deltas 0, 5, 1 are sorted to 1, 2, 3 and 0, 1, 5."""
    policy, reference = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 5.0, 1.0])
    one, zero = torch.ones(3, dtype=torch.long), torch.zeros(3)
    losses = LOSSES["aot"](Ratios(policy - reference, zero, one, one, policy), beta=2.0, label_smoothing=0.0)
    assert losses.tolist() == pytest.approx([nls(2.0), nls(2.0), nls(-4.0)], rel=1e-5)
    # Quantiles of r_w: 1, 2, 3; of r_l: 0, 1, 5.
    losses = LOSSES["aot_unpaired"](Ratios(policy, reference, one, one), beta=2.0, label_smoothing=0.0)
    assert losses.tolist() == pytest.approx([nls(2.0), nls(2.0), nls(-4.0)], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, math.log(2)),
        ("sigmoid", 0.3, math.log(2)),
        ("sigmoid_norm", 0.0, math.log(2)),
        ("hinge", 0.0, 1.0),
        ("ipo", 0.0, 25.0),
        ("robust", 0.2, math.log(2)),
        ("exo_pair", 0.2, math.log(0.5) - math.log(0.8 * 0.2) / 2),
        ("nca_pair", 0.0, 2 * math.log(2)),
        ("bco_pair", 0.0, 2 * math.log(2)),
        ("sppo_hard", 0.0, 50.0),
        ("aot", 0.0, math.log(2)),
        ("aot_unpaired", 0.0, math.log(2)),
        ("apo_zero", 0.0, 1.0),
        ("apo_down", 0.0, 1.0),
        ("discopop", 0.0, 0.5 * math.log(2) + 0.5),
        ("dpop", 0.0, math.log(2)),
        ("exponential", 0.0, 1.0),
        ("correlation", 0.0, 1.0),
    ],
)
def test_at_the_reference(loss: LossName, smoothing: float, expected: float) -> None:
    """If policy and reference are equal, every ratio is 0."""
    value = LOSSES[loss](ratios(0, 0, policy_delta=0), beta=0.1, label_smoothing=smoothing)
    assert float(value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"sppo_hard", "ipo", "apo_down"}))
def test_gradients_raise_chosen_and_lower_rejected(loss: LossName) -> None:
    """On a pair that the policy ranks wrongly."""
    w, l = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (-3.0, -2.0))  # noqa: E741
    one = torch.ones(1, dtype=torch.long)
    LOSSES[loss](Ratios(w, l, one, one, w - l), beta=0.5, label_smoothing=smoothing_of(loss, 0.1)).sum().backward()
    assert w.grad is not None and l.grad is not None and float(w.grad) < 0 < float(l.grad)


def test_ipo_has_its_minimum_at_its_target() -> None:
    beta = 0.25
    delta = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    one = torch.ones(1001, dtype=torch.long)
    values = LOSSES["ipo"](Ratios(delta, torch.zeros_like(delta), one, one), beta=beta, label_smoothing=0.0)
    assert float(delta[values.argmin()]) == pytest.approx(1 / (2 * beta))
    assert float(values.min()) == pytest.approx(0, abs=1e-20)


def test_sigmoid_gradient_is_that_of_the_paper() -> None:
    """The gradient of equation 7: d loss / d r_w = -b s(-b d), larger for a pair that the policy ranks wrongly."""
    for delta in (-30.0, -1.0, 0.0, 2.0):
        chosen = torch.tensor([delta], dtype=torch.float64, requires_grad=True)
        one = torch.ones(1, dtype=torch.long)
        LOSSES["sigmoid"](Ratios(chosen, torch.zeros(1), one, one), beta=0.2, label_smoothing=0.0).sum().backward()
        assert chosen.grad is not None
        assert float(chosen.grad) == pytest.approx(-0.2 / (1 + math.exp(0.2 * delta)), rel=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "exponential", "correlation"])
def test_losses_of_the_self_play_paper_are_convex_and_decreasing(loss: LossName) -> None:
    """Assumption 5.1 of arXiv 2401.01335, under which self-play stops exactly at the data, and l'(0) < 0."""
    t = torch.linspace(-6, 6, 241, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(241, dtype=torch.float64)
    one = torch.ones(241, dtype=torch.long)
    values = LOSSES[loss](Ratios(t, zero, one, one), beta=0.7, label_smoothing=0.0)
    (slopes,) = torch.autograd.grad(values.sum(), t)
    assert bool((values.diff() <= 0).all()) and bool((slopes <= 0).all())
    assert bool((slopes.diff() >= -1e-12).all())  # convex: the slope never falls
    # At the opponent: -1/2 for the logistic loss, -1 for the others, times b.
    at_zero = {"sigmoid": -0.5}.get(loss, -1.0)
    assert float(slopes[120]) == pytest.approx(0.7 * at_zero, rel=1e-9)


def test_the_exponential_loss_at_its_cut() -> None:
    r = Ratios(torch.tensor([-79.0, -1e4], requires_grad=True), torch.zeros(2), *torch.ones(2, 2, dtype=torch.long))
    values = LOSSES["exponential"](r, beta=1.0, label_smoothing=0.0)
    (slopes,) = torch.autograd.grad(values.sum(), r.chosen)
    assert values.tolist() == pytest.approx([math.exp(79), math.exp(80)], rel=1e-5)
    assert slopes.tolist() == pytest.approx([-math.exp(79), 0.0], rel=1e-5)


def test_sums_and_means_agree_at_equal_lengths() -> None:
    """At length L, b on means equals b / L on sums."""
    r = ratios(lengths=(8, 8))
    torch.testing.assert_close(
        LOSSES["sigmoid_norm"](r, beta=4.0, label_smoothing=0.0), LOSSES["sigmoid"](r, beta=0.5, label_smoothing=0.0)
    )


def test_extreme_ratios_stay_finite() -> None:
    for loss in LOSSES:
        for sign in (1, -1):
            chosen, rejected = (-1.0, -1e4) if loss in REFERENCE_FREE else (1e4, -1e4)
            extreme = ratios(*((chosen, rejected) if sign > 0 else (rejected, chosen)), policy_delta=sign * 1e4)
            if loss == "discopop" and sign < 0:
                continue  # Its true value is exponential here. The next test covers the other end.
            assert bool(LOSSES[loss](extreme, beta=10.0, label_smoothing=smoothing_of(loss, 0.1)).isfinite())


def test_discopop_at_very_negative_deltas() -> None:
    """If b d is very negative, m is 0 and only -log s(b d) = -b d is left."""
    for dtype in (torch.float32, torch.float64):
        r = Ratios(torch.tensor([-1e3], dtype=dtype), torch.zeros(1, dtype=dtype), *torch.ones(2, 1, dtype=torch.long))
        assert float(discopop_loss(r, beta=1.0)) == pytest.approx(1e3)


def test_orpo_is_finite_at_probability_one() -> None:
    assert bool(orpo_loss(Ratios(*torch.zeros(2, 1), *torch.ones(2, 1, dtype=torch.long)), beta=0.1).isfinite())


def test_mean_delta_of_an_empty_response() -> None:
    assert float(ratios(0, 2, (0, 4)).mean_delta) == -0.5


@pytest.mark.parametrize(
    ("loss", "values", "message"),
    [
        ("dpo", {}, "`loss` must be one of sigmoid, sigmoid_norm, hinge, ipo, robust, exo.*, but got 'dpo'"),
        ("sigmoid", {"beta": 0.0}, "`beta` must be positive, but got 0.0"),
        ("sigmoid", {"beta": math.nan}, "`beta` must be positive, but got nan"),
        ("sigmoid", {"label_smoothing": 0.5}, "`label_smoothing` must be at least 0 and below 0.5, but got 0.5"),
        ("robust", {"label_smoothing": -0.1}, "`label_smoothing` must be at least 0 and below 0.5, but got -0.1"),
        ("ipo", {"label_smoothing": 0.1}, "must be 0 for the ipo loss, which has none, but got 0.1"),
        ("hinge", {"label_smoothing": 0.1}, "must be 0 for the hinge loss, which has none, but got 0.1"),
        ("exo_pair", {}, "`label_smoothing` must be above 0 for the exo_pair loss"),
    ],
)
def test_check_loss_rejects_bad_arguments(loss: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_loss(loss, **{"beta": 0.1, "label_smoothing": 0.0, **values})


@pytest.mark.parametrize("loss", LOSSES)
def test_check_loss_accepts_good_arguments(loss: str) -> None:
    check_loss(loss, beta=0.1, label_smoothing=0.1 if loss == "exo_pair" else 0.0)


@pytest.mark.parametrize("loss", IN_DELTA)
def test_losses_in_delta_ignore_a_common_shift(loss: LossName) -> None:
    """Adding the same number to both log-ratios of a pair does not change the loss."""
    w, l = torch.randn(2, 6, dtype=torch.float64)  # noqa: E741
    lengths, smoothing = torch.randint(1, 9, (6,)), smoothing_of(loss, 0.1)
    pairs, shifted = Ratios(w, l, lengths, lengths), Ratios(w + 2, l + 2, lengths, lengths)
    torch.testing.assert_close(*(LOSSES[loss](x, beta=0.3, label_smoothing=smoothing) for x in (pairs, shifted)))
