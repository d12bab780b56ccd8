"""The minimizer of the loss, on distributions small enough for exact expectations."""

import pytest
import torch
from torch import Tensor

from lightning_align.scoring.losses import LOSSES, LossName
from lightning_align.scoring.ratios import Ratios

OUTCOMES = 50


def distribution(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUTCOMES, generator=generator, dtype=torch.float64).softmax(0)


def population_loss(logits: Tensor, p_data: Tensor, opponent: Tensor, beta: float, loss: LossName = "sigmoid") -> Tensor:
    """Compute the expected training loss over all pairs of a real and a generated outcome."""
    ratio = logits.log_softmax(0) - opponent.log()
    real, generated = ratio[:, None].expand(-1, OUTCOMES).flatten(), ratio[None, :].expand(OUTCOMES, -1).flatten()
    ones = torch.ones_like(real)
    losses = LOSSES[loss](Ratios(real, generated, ones, ones), beta=beta, label_smoothing=0.0)
    return (losses * (p_data[:, None] * opponent[None, :]).flatten()).sum()


@pytest.mark.parametrize(
    ("loss", "beta", "power"), [("sigmoid", 0.5, 2.0), ("sigmoid", 1.0, 1.0), ("sigmoid", 2.0, 0.5), ("exponential", 1.0, 0.5)]
)
def test_the_minimizer_is_the_opponent_tilted_toward_the_data(loss: LossName, beta: float, power: float) -> None:
    """Theorem 5.4: p proportional to q (p_data / q)^(1 / beta).

    For the exponential loss, the expectation is E_data exp(-b r) times E_q exp(b r). At its minimum, p_data exp(-b r) is
    proportional to q exp(b r), so the power is 1 / (2 beta).
    """
    p_data, opponent = distribution(0), distribution(1)
    logits = opponent.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=400, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = population_loss(logits, p_data, opponent, beta, loss)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    expected = (opponent.log() + power * (p_data / opponent).log()).softmax(0)
    assert float((expected - opponent).abs().max()) > 0.02
    torch.testing.assert_close(logits.detach().softmax(0), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "exponential", "correlation"])
def test_the_gradient_is_zero_if_the_opponent_is_the_data(loss: LossName) -> None:
    """Theorem 5.2. The gradient is not zero for another opponent."""
    for opponent, is_zero in ((distribution(0), True), (distribution(1), False)):
        logits = opponent.log().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(population_loss(logits, distribution(0), opponent, 0.7, loss), logits)
        assert (float(gradient.abs().max()) < 1e-12) == is_zero
