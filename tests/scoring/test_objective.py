"""Divergences, and objectives of one or several losses with margins and weights, against their formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.scoring.losses import LOSSES, discopop_loss, dpop_loss
from lightning_align.scoring.objective import Objective, diverge
from lightning_align.scoring.ratios import Ratios


def test_scores_equal_the_formulas_of_the_divergences() -> None:
    r = torch.linspace(-3, 3, 25, dtype=torch.float64)
    one = torch.ones(25, dtype=torch.long)

    def scores(name: Any, alpha: float = 0.5) -> Tensor:
        return diverge(Ratios(r, -r, one, one), name, alpha=alpha).chosen

    assert torch.equal(scores("reverse_kl"), r)
    torch.testing.assert_close(scores("forward_kl"), 1 - torch.exp(-r))
    torch.testing.assert_close(scores("js"), torch.log(2 / (1 + torch.exp(-r))))
    torch.testing.assert_close(scores("alpha"), 2 - 2 * torch.exp(-r / 2))
    torch.testing.assert_close(scores("alpha", 0.0), scores("forward_kl"))
    torch.testing.assert_close(scores("alpha", 1 + 1e-7), r, rtol=1e-5, atol=1e-5)
    for name in ("reverse_kl", "forward_kl", "js", "alpha"):
        assert bool((scores(name).diff() > 0).all()) and float(scores(name)[12]) == pytest.approx(0, abs=1e-12)
    far = Ratios(torch.tensor([-1e4]), torch.tensor([1e4]), *torch.ones(2, 1, dtype=torch.long))
    assert all(bool(part.isfinite()) for name in ("forward_kl", "js", "alpha") for part in diverge(far, name)[:2])


def pairs(count: int = 6) -> Ratios:
    w, l = torch.randn(2, count, dtype=torch.float64)  # noqa: E741
    return Ratios(w, l, *torch.randint(1, 9, (2, count)), w - l)


def test_several_losses_are_a_weighted_sum() -> None:
    r = pairs()
    several = Objective({"sigmoid": 0.8, "bco_pair": 0.2, "hinge": 2.0}, beta=0.3, label_smoothing=0.1)
    expected = (
        0.8 * LOSSES["sigmoid"](r, beta=0.3, label_smoothing=0.1)
        + 0.2 * LOSSES["bco_pair"](r, beta=0.3, label_smoothing=0.0)
        + 2.0 * LOSSES["hinge"](r, beta=0.3, label_smoothing=0.0)
    )
    torch.testing.assert_close(several(r), expected)
    assert several.needs_reference and not Objective({"simpo": 1.0, "orpo": 1.0}, beta=2.0).needs_reference


def test_loss_args_reach_the_losses_that_take_them() -> None:
    r = pairs()
    value = Objective({"dpop": 1.0, "discopop": 1.0}, beta=0.3, loss_args={"penalty": 7.0, "temperature": 0.5})(r)
    torch.testing.assert_close(value, dpop_loss(r, beta=0.3, penalty=7.0) + discopop_loss(r, beta=0.3, temperature=0.5))


def test_weights_and_margins() -> None:
    r, weights, margins = pairs(), torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    logits = 0.3 * r.delta - margins
    sigmoid = Objective("sigmoid", beta=0.3)
    torch.testing.assert_close(sigmoid(r, weights=weights, margins=margins), -weights * torch.nn.functional.logsigmoid(logits))
    torch.testing.assert_close(Objective("hinge", beta=0.3)(r, margins=margins), (1 - logits).relu())
    normalized = Objective("sigmoid_norm", beta=3.0)(r, margins=margins)
    torch.testing.assert_close(normalized, -torch.nn.functional.logsigmoid(3 * r.mean_delta - margins))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": {}}, "`loss` must be a name, or names with weights above 0, but got {}"),
        ({"loss": {"sigmoid": 0.0}}, "names with weights above 0, but got {'sigmoid': 0.0}"),
        ({"loss": {"sigmoid": 1.0, "simpo": 1.0}}, r"without a reference \(simpo\) and losses with a reference \(sigmoid\)"),
        ({"loss": {"hinge": 1.0, "ipo": 1.0}, "label_smoothing": 0.1}, "must be 0 for the hinge loss"),
        ({"loss": "simpo", "loss_args": {"gama": 1.0}}, r"only have arguments of simpo \(gamma\), but got gama"),
        ({"loss": "sigmoid", "loss_args": {"gamma": 1.0}}, r"only have arguments of sigmoid \(none\), but got gamma"),
        ({"loss": "sigmoid", "divergence": "kl"}, "`divergence` must be one of .*, but got 'kl'"),
        ({"loss": "bco_pair", "divergence": "js"}, "must be reverse_kl with the loss bco_pair, but got js"),
        ({"loss": "sigmoid", "divergence": "alpha", "divergence_alpha": 1.0}, "`divergence_alpha` must not be 1"),
    ],
)
def test_bad_combinations_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**{"beta": 0.1, **arguments})


def test_unsupported_margins_and_weights_are_rejected() -> None:
    column = torch.ones(6)
    with pytest.raises(ValueError, match="margins, because the loss bco_pair does not support them"):
        Objective("bco_pair", beta=0.1)(pairs(), margins=column)
    with pytest.raises(ValueError, match="the scales of the margins differ"):
        Objective({"sigmoid": 1.0, "ipo": 1.0}, beta=0.1)(pairs(), margins=column)
    with pytest.raises(ValueError, match="weights, because the loss aot has no loss per pair"):
        Objective("aot", beta=0.1)(pairs(), weights=column)
