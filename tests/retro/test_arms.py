"""Tests of the arms against values computed by hand, and of the coverage of the interval."""

import math

import pytest
import torch

from lightning_align.retro.arms import RetrievalArms, interval


def filled() -> RetrievalArms:
    """Make a metric with two documents in three windows of chunks of 2 tokens. All nats are whole bits."""
    arms = RetrievalArms(["on", "off"])
    bit = math.log(2)
    targets = torch.tensor([[False, True, True, True], [False, True, False, False]])
    on = torch.tensor([[0.0, 1, 2, 3], [0, 4, 0, 0]]) * bit
    off = torch.tensor([[0.0, 2, 4, 6], [0, 4, 0, 0]]) * bit
    overlap = torch.tensor([[0.1, 0.5], [1.0, 0.0]])
    chunk_bytes = torch.tensor([[4, 6], [10, 0]])
    arms.update(torch.stack((on, off)), targets, torch.tensor([7, 3]), overlap, chunk_bytes, 2)
    late = torch.tensor([[False, True]])
    nats = torch.stack((torch.tensor([[0.0, 5]]), torch.tensor([[0.0, 8]]))) * bit
    arms.update(nats, late, torch.tensor([7]), torch.tensor([[0.125]]), torch.tensor([[5]]), 2)
    return arms


def test_values_computed_by_hand() -> None:
    values = filled().compute()
    assert values["documents"] == 2
    assert values["on/bits_per_byte"] == pytest.approx((1 + 5 + 4 + 5) / 25)
    assert values["off/bits_per_byte"] == pytest.approx((2 + 10 + 4 + 8) / 25)
    assert values["off/gain"] == pytest.approx(9 / 25)
    assert values["loss"] == pytest.approx(15 * math.log(2) / 5)
    # The chunks with overlap 0.1 and 0.125 have 4 and 5 bytes and cost 1 and 5 bits ON. One more, with 6 bytes, has 0.5.
    assert values["bytes_alpha_0.125"] == 9 and values["bytes_alpha_0.25"] == 9 and values["bytes_alpha_0.5"] == 15
    assert values["on/bits_per_byte_alpha_0.125"] == pytest.approx(6 / 9)
    assert values["off/bits_per_byte_alpha_0.5"] == pytest.approx((2 + 8 + 10) / 15)
    # Bootstrap samples of two documents: 7 and 7 (a gain of 9 bits on 15 bytes), 7 and 3, 3 and 3 (no gain).
    assert values["off/gain_low"] == pytest.approx(0) and values["off/gain_high"] == pytest.approx(9 / 15)


def test_converting_the_metric_keeps_its_values() -> None:
    arms = filled()
    want = arms.compute()
    arms._computed = None
    assert arms.to(torch.bfloat16).compute() == want


def test_interval_covers_the_mean_in_about_95_percent_of_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        num_bytes = torch.randint(50, 150, (60,), generator=generator).double()
        bits = num_bytes * (0.3 + torch.randn(60, generator=generator, dtype=torch.float64))
        low, high = interval(bits, num_bytes)
        covered += low < 0.3 < high
    assert 0.88 <= covered / 200 <= 0.99
