"""Losses on pairs, as functions of log-prob ratios, and the numbers that every user of them watches.

For a response y to x the log-ratio is  r = log p(y|x) - log q(y|x)  under policy p and reference q; w is preferred to
l, d = r_w - r_l, s is the sigmoid, b is beta, e is the label smoothing. Where a loss has no reference, q is 1.
"""

import math
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_align.scoring.ratios import Ratios

LossName = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "dpop",
    "simpo",
    "cpo",
    "orpo",
]


class PairwiseLoss(Protocol):
    """A loss a pair, (B,), from log-ratios."""

    def __call__(self, ratios: Ratios, *, beta: float, label_smoothing: float) -> Tensor:
        """The loss of each pair."""
        ...


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(b d) - e log s(-b d).

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


def exo_pair_loss(ratios: Ratios, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(Bernoulli(s(b d)) || Bernoulli(1 - e)): the policy's preference against the labels', in reverse; e > 0.

    EXO, Ji et al. 2024, arXiv 2402.00856, equation 16.
    """
    logits = beta * ratios.delta
    wins, loses = F.logsigmoid(logits), F.logsigmoid(-logits)
    return wins.exp() * (wins - math.log1p(-label_smoothing)) + loses.exp() * (loses - math.log(label_smoothing))


def nca_pair_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(b r_w) - (log s(-b r_w) + log s(-b r_l)) / 2; NCA, Chen et al. 2024, arXiv 2402.05369."""
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def bco_pair_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(b r_w) - log s(-b r_l): a classifier of responses; BCO, Jung et al. 2024, arXiv 2404.04656, without its shift."""
    return -F.logsigmoid(beta * ratios.chosen) - F.logsigmoid(-beta * ratios.rejected)


def sppo_hard_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(r_w - 1 / (2 b))^2 + (r_l + 1 / (2 b))^2; SPPO with certain wins, Wu et al. 2024, arXiv 2405.00675."""
    target = 1 / (2 * beta)
    return (ratios.chosen - target) ** 2 + (ratios.rejected + target) ** 2


def aot_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(b d) - e log s(-b d) with d between quantiles of the policy's and of the reference's deltas.

    Melnyk et al. 2024, arXiv 2406.05882. What is sorted is the micro-batch of a rank, so unlike the others this loss depends on
    how an optimizer batch is cut; its values stand in the order of the quantiles and belong to no pair.
    """
    assert ratios.policy_delta is not None, "aot needs Ratios.policy_delta"
    reference_delta = ratios.policy_delta - ratios.delta
    return _smoothed(beta * (ratios.policy_delta.sort().values - reference_delta.sort().values), label_smoothing)


def aot_unpaired_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The same with d between quantiles of r_w and of r_l."""
    return _smoothed(beta * (ratios.chosen.sort().values - ratios.rejected.sort().values), label_smoothing)


def apo_zero_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """1 - s(b r_w) + s(b r_l): chosen up, rejected down; APO, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7."""
    return torch.sigmoid(-beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)


def apo_down_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """s(b r_w) + 1 - s(b d): both down, rejected further; the same paper, equation 8."""
    return torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(-beta * ratios.delta)


def discopop_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0, temperature: float = 0.05) -> Tensor:
    """(1 - m) (-log s(b d)) + m exp(-b d) with m = s(b d / t); Lu et al. 2024, arXiv 2406.08414."""
    logits = beta * ratios.delta
    # As one power: m alone is 0 and exp(-b d) alone is infinite where b d is very negative.
    exponential = (F.logsigmoid(logits / temperature) - logits).exp()
    return -torch.sigmoid(-logits / temperature) * F.logsigmoid(logits) + exponential


def dpop_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0, penalty: float = 50.0) -> Tensor:
    """DPO of d - c max(0, -r_w): chosen responses must not become less likely.

    DPO-Positive, Pal et al. 2024, arXiv 2402.13228, equation 3.
    """
    return _smoothed(beta * (ratios.delta - penalty * F.relu(-ratios.chosen)), label_smoothing)


def simpo_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0, gamma: float = 1.0) -> Tensor:
    """-log s(b (log p(y_w) / |y_w| - log p(y_l) / |y_l|) - g), smoothed; no reference.

    SimPO, Meng et al. 2024, arXiv 2405.14734, equation 6. Takes a b of 2 to 10, and a g of 0.3 to 1.6.
    """
    return _smoothed(beta * ratios.mean_delta - gamma, label_smoothing)


def cpo_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(b (log p(y_w) - log p(y_l))), smoothed; no reference. To be added: a log-likelihood term.

    CPO, Xu et al. 2024, arXiv 2401.08417, equation 4.
    """
    return _smoothed(beta * ratios.delta, label_smoothing)


def orpo_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-b log s(log odds(y_w) - log odds(y_l)) with odds p / (1 - p), p^|y| = p(y|x); no reference.

    ORPO, Hong et al. 2024, arXiv 2403.07691, equations 4 to 7. To be added: a log-likelihood term.
    """
    return -beta * F.logsigmoid(_log_odds(ratios.chosen_mean) - _log_odds(ratios.rejected_mean))


def _log_odds(logp: Tensor) -> Tensor:
    """The log of p / (1 - p); a response that is certain counts as one that is certain to rounding."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


LOSSES: dict[LossName, PairwiseLoss] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "dpop": dpop_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
}
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "dpop", "simpo", "cpo")
REFERENCE_FREE = ("simpo", "cpo", "orpo")
SORTED = ("aot", "aot_unpaired")
"""Their values belong to quantiles, and to no pair."""
IN_DELTA = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")
"""They depend on the scores of a pair by their difference alone: the ones that divergences and margins are defined for."""


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
    if loss == "exo_pair" and not label_smoothing:
        raise ValueError("label_smoothing is 0, at which the exo_pair loss is infinite: give one above 0, such as 0.001")
