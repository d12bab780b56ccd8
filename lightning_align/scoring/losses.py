"""Losses on pairs, as functions of log-prob ratios.

Notation: r = log p(y|x) - log q(y|x) is the log-ratio of a response y to the prompt x under the policy p and the reference q.
w is the chosen response and l the rejected one, d = r_w - r_l, s is the sigmoid, b is beta, e is the label smoothing. Losses
without a reference use q = 1.
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
    "exponential",
    "correlation",
]


class PairwiseLoss(Protocol):
    """A function from the log-ratios of B pairs to (B,) losses."""

    def __call__(self, ratios: Ratios, *, beta: float, label_smoothing: float) -> Tensor:
        """Compute the loss of each pair."""
        ...


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute -(1 - e) log s(b d) - e log s(-b d).

    DPO, Rafailov et al. 2023, arXiv 2305.18290, equation 7. With e > 0 it is conservative DPO, Mitchell 2023.
    """
    return _smoothed(beta * ratios.delta, label_smoothing)


def sigmoid_norm_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute the sigmoid loss with d = r_w / |y_w| - r_l / |y_l|.

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124. Typical values of b are 2 to 10.
    """
    return _smoothed(beta * ratios.mean_delta, label_smoothing)


def hinge_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute max(0, 1 - b d).

    SLiC, Zhao et al. 2023, arXiv 2305.10425, with the reference of RSO, arXiv 2309.06657.
    """
    return F.relu(1 - beta * ratios.delta)


def ipo_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute (d - 1 / (2 b))^2 with d = r_w / |y_w| - r_l / |y_l|.

    IPO, Azar et al. 2023, arXiv 2310.12036, equation 17.
    """
    return (ratios.mean_delta - 1 / (2 * beta)) ** 2


def robust_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute (-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2 e).

    It is unbiased if a share e of the labels is flipped. Chowdhury et al. 2024, arXiv 2403.00409.
    """
    logits = beta * ratios.delta
    loss = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return loss / (1 - 2 * label_smoothing)


def exo_pair_loss(ratios: Ratios, *, beta: float, label_smoothing: float) -> Tensor:
    """Compute KL(Bernoulli(s(b d)) || Bernoulli(1 - e)), the reverse KL from the policy's preference to the label's.

    EXO, Ji et al. 2024, arXiv 2402.00856, equation 16. Needs e > 0.
    """
    logits = beta * ratios.delta
    wins, loses = F.logsigmoid(logits), F.logsigmoid(-logits)
    return wins.exp() * (wins - math.log1p(-label_smoothing)) + loses.exp() * (loses - math.log(label_smoothing))


def nca_pair_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute -log s(b r_w) - (log s(-b r_w) + log s(-b r_l)) / 2.

    NCA, Chen et al. 2024, arXiv 2402.05369.
    """
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def bco_pair_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute -log s(b r_w) - log s(-b r_l), the loss of a binary classifier of responses.

    BCO, Jung et al. 2024, arXiv 2404.04656, without its reward shift.
    """
    return -F.logsigmoid(beta * ratios.chosen) - F.logsigmoid(-beta * ratios.rejected)


def sppo_hard_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute (r_w - 1 / (2 b))^2 + (r_l + 1 / (2 b))^2.

    SPPO with win probabilities of 1 and 0, Wu et al. 2024, arXiv 2405.00675.
    """
    target = 1 / (2 * beta)
    return (ratios.chosen - target) ** 2 + (ratios.rejected + target) ** 2


def aot_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute the sigmoid loss with d = the difference of the sorted policy deltas and the sorted reference deltas.

    AOT, Melnyk et al. 2024, arXiv 2406.05882. The deltas are log p(y_w) - log p(y_l) under each model. They are sorted within
    the micro-batch of a rank, so this loss depends on how an optimizer batch is split, unlike the other losses. Its values are
    in the order of the quantiles and do not belong to pairs.
    """
    assert ratios.policy_delta is not None, "aot needs Ratios.policy_delta"
    reference_delta = ratios.policy_delta - ratios.delta
    return _smoothed(beta * (ratios.policy_delta.sort().values - reference_delta.sort().values), label_smoothing)


def aot_unpaired_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute the sigmoid loss with d = the difference of the sorted r_w and the sorted r_l. See `aot_loss`."""
    return _smoothed(beta * (ratios.chosen.sort().values - ratios.rejected.sort().values), label_smoothing)


def apo_zero_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute 1 - s(b r_w) + s(b r_l), which raises chosen and lowers rejected responses.

    APO-zero, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.
    """
    return torch.sigmoid(-beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)


def apo_down_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute s(b r_w) + 1 - s(b d), which lowers both responses, the rejected one further.

    APO-down, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.
    """
    return torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(-beta * ratios.delta)


def discopop_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0, temperature: float = 0.05) -> Tensor:
    """Compute (1 - m) (-log s(b d)) + m exp(-b d) with m = s(b d / t), where t is the temperature.

    DiscoPOP, Lu et al. 2024, arXiv 2406.08414.
    """
    logits = beta * ratios.delta
    # m exp(-b d) is computed as one exponential. If b d is very negative, m is 0 and exp(-b d) is infinite.
    exponential = (F.logsigmoid(logits / temperature) - logits).exp()
    return -torch.sigmoid(-logits / temperature) * F.logsigmoid(logits) + exponential


def dpop_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0, penalty: float = 50.0) -> Tensor:
    """Compute the sigmoid loss with d - c max(0, -r_w) instead of d, where c is the penalty.

    The penalty keeps chosen responses from becoming less likely. DPO-Positive, Pal et al. 2024, arXiv 2402.13228, equation 3.
    """
    return _smoothed(beta * (ratios.delta - penalty * F.relu(-ratios.chosen)), label_smoothing)


def simpo_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0, gamma: float = 1.0) -> Tensor:
    """Compute -log s(b (log p(y_w) / |y_w| - log p(y_l) / |y_l|) - g), smoothed, where g is gamma.

    SimPO, Meng et al. 2024, arXiv 2405.14734, equation 6. Uses no reference. Typical values of b are 2 to 10, of g 0.3 to 1.6.
    """
    return _smoothed(beta * ratios.mean_delta - gamma, label_smoothing)


def cpo_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute -log s(b (log p(y_w) - log p(y_l))), smoothed.

    CPO, Xu et al. 2024, arXiv 2401.08417, equation 4. Uses no reference. The caller adds the log-likelihood term of the paper.
    """
    return _smoothed(beta * ratios.delta, label_smoothing)


def orpo_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute -b log s(log odds(y_w) - log odds(y_l)) with odds = p / (1 - p) and p^|y| = p(y|x).

    ORPO, Hong et al. 2024, arXiv 2403.07691, equations 4 to 7. Uses no reference. The caller adds the log-likelihood term of
    the paper.
    """
    return -beta * F.logsigmoid(_log_odds(ratios.chosen_mean) - _log_odds(ratios.rejected_mean))


def exponential_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute exp(-b d).

    SPIN, Chen et al. 2024, arXiv 2401.01335, section 4, with l(t) = exp(-t). Exponents are cut at 80, because exp(88) is near
    the largest float32 number. A pair beyond that has no gradient.
    """
    return (-beta * ratios.delta).clamp(max=80).exp()


def correlation_loss(ratios: Ratios, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute 1 - b d.

    SPIN, Chen et al. 2024, arXiv 2401.01335, section 4, with l(t) = 1 - t. Every pair has the same slope, however well the
    policy ranks it, so nothing bounds the loss. The first step equals that of the hinge loss.
    """
    return 1 - beta * ratios.delta


def _log_odds(logp: Tensor) -> Tensor:
    """Compute log(p / (1 - p)). The log-prob is clamped to -eps, so that p = 1 has finite odds."""
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
    "exponential": exponential_loss,
    "correlation": correlation_loss,
}
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "dpop", "simpo", "cpo")
REFERENCE_FREE = ("simpo", "cpo", "orpo")
SORTED = ("aot", "aot_unpaired")
"""Losses with values that belong to quantiles and not to pairs."""
IN_DELTA = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "exponential", "correlation")
"""Losses that depend only on the difference of the two scores of a pair. Divergences and margins are defined for these."""


def check_loss(loss: str, *, beta: float, label_smoothing: float) -> None:
    """Check the arguments of a loss.

    Args:
        loss: The name of the loss.
        beta: See the losses.
        label_smoothing: The assumed share of flipped labels.

    Raises:
        ValueError: If the loss is unknown, `beta` is not positive, `label_smoothing` is outside of [0, 0.5) or is given for a
            loss that has none, or the loss is exo_pair and `label_smoothing` is 0.
    """
    if loss not in LOSSES:
        raise ValueError(f"`loss` must be one of {', '.join(get_args(LossName))}, but got {loss!r}.")
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, but got {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"`label_smoothing` must be at least 0 and below 0.5, but got {label_smoothing}. It is the share of flipped labels."
        )
    if label_smoothing and loss not in SMOOTHED:
        raise ValueError(
            f"`label_smoothing` must be 0 for the {loss} loss, which has none, but got {label_smoothing}. Set it to 0, or use "
            f"one of {', '.join(SMOOTHED)}."
        )
    if loss == "exo_pair" and not label_smoothing:
        raise ValueError(
            "`label_smoothing` must be above 0 for the exo_pair loss, which is infinite at 0. Use 0.001, for example."
        )
