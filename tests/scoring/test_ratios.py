"""Log-ratios of pairs, their metrics and their weights, against values computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from lightning_align.scoring.ratios import confidence_weights, log_ratios, pair_metrics, split_pairs, tail_weights
from lightning_align.types import LogProbs


def logprobs(*sums: float) -> LogProbs:
    return LogProbs(torch.tensor(sums), torch.arange(1, len(sums) + 1))


def test_split_pairs_takes_the_first_half_as_chosen() -> None:
    chosen, rejected = split_pairs(logprobs(1.0, 2.0, 3.0, 4.0))
    assert (chosen.sums.tolist(), rejected.sums.tolist()) == ([1, 2], [3, 4])
    assert (chosen.counts.tolist(), rejected.counts.tolist()) == ([1, 2], [3, 4])


def test_metrics_by_hand() -> None:
    policy, reference = logprobs(-1.0, -2.0, -6.0, -3.0), logprobs(-3.0, -4.0, -4.0, -8.0)
    r = log_ratios(policy, reference)
    # Pair 0: r_w = -1 + 3 = 2, r_l = -6 + 4 = -2. Pair 1: r_w = 2, r_l = 5, so the policy prefers the rejected response.
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


def test_a_tie_does_not_count_as_accurate() -> None:
    metrics = pair_metrics(logprobs(-1.0, -1.0), log_ratios(logprobs(-1.0, -1.0), logprobs(-1.0, -1.0)), beta=1.0)
    assert metrics["rewards/accuracies"].tolist() == [0.0]


def test_metrics_have_no_gradient() -> None:
    sums = torch.zeros(2, requires_grad=True)
    policy = LogProbs(sums, torch.ones(2, dtype=torch.long))
    metrics = pair_metrics(policy, log_ratios(policy, policy), beta=1.0)
    assert not any(value.requires_grad for value in metrics.values())


def test_tail_weights_by_hand() -> None:
    """Chosen has 3 targets and rejected has 1, so the last 2 targets of chosen have the weight 1/4."""
    targets = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    weights = tail_weights(targets, 0.25)
    assert weights[targets].tolist() == [1.0, 0.25, 0.25, 1.0]
    assert tail_weights(targets, 1.0)[targets].tolist() == [1.0] * 4


def test_confidence_weights_by_hand() -> None:
    """Two tokens of probability 1/2 out of two: p / sum p^2 = 1. One token of probabilities 0.8 and 0.2: 0.8 / 0.68."""
    sums = torch.tensor([2 * math.log(0.5), math.log(0.8)])
    collisions = torch.tensor([2 * math.log(0.5), math.log(0.68)])
    weights = confidence_weights(LogProbs(sums, torch.tensor([2, 1])), collisions)
    assert weights.tolist() == pytest.approx([0.8 / 0.68])
