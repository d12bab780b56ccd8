"""Losses on pairs, as functions of log-prob ratios, and the numbers that every user of them watches.

For a response y to x the log-ratio is  r = log p(y|x) - log q(y|x)  under policy p and reference q; w is preferred to
l.
"""

from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_align.types import LogProbs

LossName = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust"]


class Ratios(NamedTuple):
    """Log-ratios of pairs: sums over the response in nats, and lengths in tokens."""

    chosen: Tensor
    """(B,) r_w."""
    rejected: Tensor
    """(B,) r_l."""
    chosen_lengths: Tensor
    """(B,) |y_w|."""
    rejected_lengths: Tensor
    """(B,) |y_l|."""

    @property
    def delta(self) -> Tensor:
        """(B,) r_w - r_l."""
        return self.chosen - self.rejected

    @property
    def mean_delta(self) -> Tensor:
        """(B,) r_w / |y_w| - r_l / |y_l|."""
        return self.chosen / self.chosen_lengths.clamp(min=1) - self.rejected / self.rejected_lengths.clamp(min=1)


class PairwiseLoss(Protocol):
    """A loss a pair, (B,), from log-ratios."""

    def __call__(self, ratios: Ratios, *, beta: float, label_smoothing: float) -> Tensor:
        """The loss of each pair."""
        ...


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(b d) - e log s(-b d), with d = r_w - r_l.

    DPO, Rafailov et al. 2023, arXiv 2305.18290, equation 7; with e > 0 conservative DPO, Mitchell 2023.
    """
    return _smoothed(beta * ratios.delta, label_smoothing)


def sigmoid_norm_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The same with d = r_w / |y_w| - r_l / |y_l|; Lambert et al. 2024 (Tulu 3), arXiv 2411.15124. Takes a b of 2 to 10."""
    return _smoothed(beta * ratios.mean_delta, label_smoothing)


def hinge_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """max(0, 1 - b d); SLiC, Zhao et al. 2023, arXiv 2305.10425, with the reference of RSO, arXiv 2309.06657."""
    return F.relu(1 - beta * ratios.delta)


def ipo_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(d - 1 / (2 b))^2 with length-normalised d; Azar et al. 2023, arXiv 2310.12036, equation 17."""
    return (ratios.mean_delta - 1 / (2 * beta)) ** 2


def robust_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2 e): unbiased where a share e of the labels is flipped.

    Chowdhury et al. 2024, arXiv 2403.00409.
    """
    logits = beta * ratios.delta
    loss = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return loss / (1 - 2 * label_smoothing)


LOSSES: dict[LossName, PairwiseLoss] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "robust": robust_loss,
}
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust")


def check_loss(loss: str, *, beta: float, label_smoothing: float) -> None:
    """Refuse what a loss cannot use.

    Raises:
        ValueError: if the loss is unknown, `beta` is not positive, `label_smoothing` is outside of [0, 0.5), or the loss has
            no label smoothing.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(get_args(LossName))}")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it is the share of flipped labels, at least 0 and below 0.5")
    if label_smoothing and loss not in SMOOTHED:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but the {loss} loss has none; it applies to {', '.join(SMOOTHED)}"
        )


def split_pairs(logprobs: LogProbs) -> tuple[LogProbs, LogProbs]:
    """Undo the concatenation of chosen and rejected rows: (2B,) -> (B,), (B,)."""
    pairs = logprobs.sums.shape[0] // 2
    chosen, rejected = (LogProbs(logprobs.sums[part], logprobs.counts[part]) for part in (slice(pairs), slice(pairs, None)))
    return chosen, rejected


def log_ratios(policy: LogProbs, reference: LogProbs) -> Ratios:
    """Ratios of a batch of pairs whose first half are the chosen rows, (2B,) each."""
    (chosen, rejected), (ref_chosen, ref_rejected) = split_pairs(policy), split_pairs(reference)
    return Ratios(chosen.sums - ref_chosen.sums, rejected.sums - ref_rejected.sums, chosen.counts, rejected.counts)


@torch.no_grad()
def pair_metrics(policy: LogProbs, ratios: Ratios, *, beta: float) -> dict[str, Tensor]:
    """What is logged, a value a pair (B,): implicit rewards b r, their margins, and the policy's log-probs (sums, in nats)."""
    chosen, rejected = split_pairs(policy)
    rewards_chosen, rewards_rejected = beta * ratios.chosen, beta * ratios.rejected
    return {
        "rewards/chosen": rewards_chosen,
        "rewards/rejected": rewards_rejected,
        "rewards/margins": rewards_chosen - rewards_rejected,
        "rewards/accuracies": (rewards_chosen > rewards_rejected).float(),
        "logps/chosen": chosen.sums.detach(),
        "logps/rejected": rejected.sums.detach(),
    }
