"""Peaked logits, as trained models have them: products with subnormal numbers are slow on a CPU, so that none are made."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lightning_align.scoring import head
from lightning_align.scoring.head import exp_without_tiny_, head_logprobs
from lightning_align.scoring.logits import logits_logprobs

SMALLEST = torch.finfo(torch.float32).tiny
ROWS, WIDTH, VOCABULARY = 40, 32, 500


def subnormal(x: Tensor) -> Tensor:
    """Which entries are smaller than normal numbers, but not 0."""
    return (x != 0) & (x.abs() < SMALLEST)


def inputs(deviation: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a weight whose logits have this standard deviation, and targets."""
    hidden = deviation * torch.randn(ROWS, WIDTH)
    return hidden, torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5, torch.randint(VOCABULARY, (ROWS,))


def test_exp_of_small_powers_by_hand() -> None:
    powers = torch.tensor([0.0, -45.9, -46.1, -90.0, -math.inf, math.nan])
    found = exp_without_tiny_(powers.clone())
    assert found[0] == 1 and found[1] > 1e-20 and found[2:5].tolist() == [0, 0, 0] and found[5].isnan()
    exact = exp_without_tiny_(powers.double())
    torch.testing.assert_close(exact, powers.double().exp(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4 * ROWS * 64])
@pytest.mark.parametrize("deviation", [1.0, 8.0, 30.0])
def test_no_factor_is_subnormal_and_the_gradients_are_exact(
    deviation: float, chunk_bytes: int, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = inputs(deviation)
    factors = []

    def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
        factors.append(a.clone())
        into.addmm_(a, b)

    monkeypatch.setattr(head, "KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(head, "add_product", add_product)
    found = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logps = head_logprobs(*found, None, targets, chunk_bytes=chunk_bytes)
    logps.sum().backward()
    expected = (exact[0] @ exact[1].T).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    expected.sum().backward()
    assert not any(bool(subnormal(a).any()) for a in factors)
    if deviation == 30:  # the test sees what it is about
        assert subnormal((exact[0] @ exact[1].T).softmax(1).float()).double().mean() > 0.05
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=1e-5 * float(other.grad.abs().max()))


def test_the_gradient_of_given_logits_is_not_subnormal() -> None:
    given = (30 * torch.randn(1, ROWS, VOCABULARY)).requires_grad_()
    rows, before, targets = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS), torch.randint(VOCABULARY, (ROWS,))
    logits_logprobs(given, rows, before, targets).sum().backward()
    expected = torch.nn.functional.one_hot(targets, VOCABULARY) - given.detach()[0].double().softmax(1)
    assert given.grad is not None and not bool(subnormal(given.grad).any())
    torch.testing.assert_close(given.grad[0].double(), expected, rtol=0, atol=1e-5)


THREADS = """
import torch
from lightning_align import cli
def run():
    numbers = torch.full((400_000,), 1e-20)
    print(float((numbers * numbers).count_nonzero()), torch.get_num_threads())
cli.run = run
cli.main()
"""


def test_the_command_line_computes_with_0_in_all_threads() -> None:
    """Were the setting made after torch has started its threads, half of the results would not be 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.0", "2"]
