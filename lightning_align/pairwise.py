"""Losses on pairs, as functions of log-prob ratios, and the numbers that every user of them watches.

For a response y to x the log-ratio is  r = log p(y|x) - log q(y|x)  under policy p and reference q; w is preferred to
l, d = r_w - r_l, s is the sigmoid, b is beta, e is the label smoothing. Where a loss has no reference, q is 1.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_align.types import LogProbs

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
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


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
    policy_delta: Tensor | None = None
    """(B,) log p(y_w) - log p(y_l), which `aot` sorts by itself."""

    @property
    def delta(self) -> Tensor:
        """(B,) r_w - r_l."""
        return self.chosen - self.rejected

    @property
    def chosen_mean(self) -> Tensor:
        """(B,) r_w / |y_w|; 0 for an empty response."""
        return self.chosen / self.chosen_lengths.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        """(B,) r_l / |y_l|; 0 for an empty response."""
        return self.rejected / self.rejected_lengths.clamp(min=1)

    @property
    def mean_delta(self) -> Tensor:
        """(B,) r_w / |y_w| - r_l / |y_l|."""
        return self.chosen_mean - self.rejected_mean


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
SATURATED = 0.02
"""Of the slope at the reference; the sigmoid loss, whose slope there is half of the largest, has less where s(b d) > 0.99."""


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


def diverge(ratios: Ratios, divergence: Divergence, *, alpha: float = 0.5) -> Ratios:
    """Scores f'(p/q) in the place of log-ratios: DPO for other divergences, Wang et al. 2023, arXiv 2309.16240.

    reverse_kl: r. forward_kl: 1 - exp(-r). js: log 2 + log s(r). alpha: (exp((a - 1) r) - 1) / (a - 1), whose limit for a to 1
    is the first and whose value for a = 0 is the second. Powers are cut at exp(80), near the largest number of float32.

    Raises:
        ValueError: if the divergence is unknown.
    """

    def score(r: Tensor) -> Tensor:
        match divergence:
            case "reverse_kl":
                return r
            case "forward_kl":
                return -torch.expm1((-r).clamp(max=80))
            case "js":
                return math.log(2) + F.logsigmoid(r)
            case "alpha":
                return torch.expm1(((alpha - 1) * r).clamp(max=80)) / (alpha - 1)
        raise ValueError(f"divergence is {divergence!r}; it must be one of {', '.join(get_args(Divergence))}")

    return ratios._replace(chosen=score(ratios.chosen), rejected=score(ratios.rejected))


class Objective:
    """One loss, or a weighted sum of several, with all that goes with it, checked once.

    A margin m of a pair makes b d into b d - m (Touvron et al. 2023, arXiv 2307.09288, equation 2).
    """

    def __init__(
        self,
        loss: str | Mapping[Any, float],
        *,
        beta: float,
        label_smoothing: float = 0.0,
        loss_args: Mapping[str, float] | None = None,
        divergence: Divergence = "reverse_kl",
        divergence_alpha: float = 0.5,
    ) -> None:
        """Choose the losses.

        Args:
            loss: a name, or names with their weights.
            beta: see the losses.
            label_smoothing: for those of the losses that have it; at least one must.
            loss_args: further arguments of the losses, by name: `temperature` of discopop, `penalty` of dpop, `gamma` of simpo.
            divergence: what the policy is held to the reference by.
            divergence_alpha: of the alpha divergence.

        Raises:
            ValueError: if a loss cannot use its numbers, or the losses do not go together.
        """
        self.weights: dict[str, float] = {loss: 1.0} if isinstance(loss, str) else dict(loss)
        if not self.weights or any(not weight > 0 for weight in self.weights.values()):
            raise ValueError(f"loss is {self.weights}; give a name, or names with weights above 0")
        smoothed = [name for name in self.weights if name in SMOOTHED]
        for name in self.weights:
            # Of several losses some may have no smoothing; if none has, the first of them says so.
            check_loss(name, beta=beta, label_smoothing=label_smoothing if name in smoothed or not smoothed else 0.0)
        free = [name for name in self.weights if name in REFERENCE_FREE]
        if free and len(free) < len(self.weights):
            others = [name for name in self.weights if name not in free]
            raise ValueError(
                f"loss has {', '.join(free)}, without a reference, and {', '.join(others)}, with one: choose one kind"
            )
        if divergence not in get_args(Divergence):
            raise ValueError(f"divergence is {divergence!r}; it must be one of {', '.join(get_args(Divergence))}")
        if divergence == "alpha" and divergence_alpha == 1:
            raise ValueError("divergence_alpha is 1, where the alpha divergence is the reverse KL: give divergence: reverse_kl")
        unfit = [name for name in self.weights if name not in IN_DELTA]
        if divergence != "reverse_kl" and unfit:
            raise ValueError(
                f"divergence is {divergence}, which is defined for {', '.join(IN_DELTA)}, not for {', '.join(unfit)}"
            )
        self.needs_reference = not free
        self._no_margin = unfit
        self._sorted = [name for name in self.weights if name in SORTED]
        self._divergence, self._alpha, self._beta = divergence, divergence_alpha, beta
        self._terms = self._bind(beta, label_smoothing, dict(loss_args or {}))

    def _bind(
        self, beta: float, label_smoothing: float, further: dict[str, float]
    ) -> list[tuple[float, Callable[[Ratios], Tensor]]]:
        known: set[str] = set()
        terms: list[tuple[float, Callable[[Ratios], Tensor]]] = []
        for name, weight in self.weights.items():
            function: Callable[..., Tensor] = LOSSES[name]  # type: ignore[index]  # checked above
            own = set(inspect.signature(function).parameters) - {"ratios", "beta", "label_smoothing"}
            known |= own
            given: dict[str, Any] = {key: value for key, value in further.items() if key in own}

            def term(ratios: Ratios, function: Callable[..., Tensor] = function, given: dict[str, Any] = given) -> Tensor:
                return function(ratios, beta=beta, label_smoothing=label_smoothing, **given)

            terms.append((weight, term))
        if unknown := sorted(set(further) - known):
            raise ValueError(
                f"loss_args has {', '.join(unknown)}, but {', '.join(self.weights)} takes {', '.join(sorted(known)) or 'none'}"
            )
        return terms

    def __call__(self, ratios: Ratios, *, weights: Tensor | None = None, margins: Tensor | None = None) -> Tensor:
        """The loss of each pair.

        Args:
            ratios: of B pairs.
            weights: (B,) what each pair's loss is multiplied with.
            margins: (B,) by how much b d should be above 0.

        Returns:
            (B,).

        Raises:
            ValueError: if there are margins, or weights, of pairs that the loss does not tell apart.
        """
        ratios = diverge(ratios, self._divergence, alpha=self._alpha)
        if margins is not None:
            if self._no_margin:
                raise ValueError(
                    f"the rows have margins, which the loss {self._no_margin[0]} has no place for: drop the column"
                )
            shift = margins / self._beta
            # A mean is of sums: there the shift is one a token.
            normalised = {"sigmoid_norm", "ipo"} & self.weights.keys()
            if normalised and len(normalised) < len(self.weights):
                raise ValueError(f"the rows have margins, which {', '.join(self.weights)} would each put on another scale")
            scale = ratios.chosen_lengths.clamp(min=1) if normalised else 1
            ratios = ratios._replace(chosen=ratios.chosen - shift * scale)
        if weights is not None and self._sorted:
            raise ValueError(f"pairs have weights, and the loss {self._sorted[0]} tells no pairs apart: use one without")
        losses = torch.stack([weight * term(ratios) for weight, term in self._terms]).sum(dim=0)
        return losses if weights is None else losses * weights

    def saturated(self, ratios: Ratios, *, margins: Tensor | None = None) -> Tensor:
        """Which pairs (B,) have no gradient left: less than `SATURATED` of what they had at the reference."""
        start = ratios._replace(chosen=torch.zeros_like(ratios.chosen), rejected=torch.zeros_like(ratios.rejected))
        return self._slopes(ratios, margins) < SATURATED * self._slopes(start, margins)

    def _slopes(self, ratios: Ratios, margins: Tensor | None) -> Tensor:
        """|dL/dr_w| + |dL/dr_l| of each pair (B,)."""
        # Validation is in inference mode, whose tensors only a copy brings out of it.
        with torch.inference_mode(False), torch.enable_grad():
            fixed = Ratios(*(None if part is None else part.detach().clone() for part in ratios))  # type: ignore[arg-type]
            sides = fixed.chosen.requires_grad_(), fixed.rejected.requires_grad_()
            if fixed.policy_delta is not None:
                # The same derivative through log p as through log p - log q.
                fixed = fixed._replace(policy_delta=fixed.policy_delta + fixed.delta - fixed.delta.detach())
            losses = self(fixed, margins=None if margins is None else margins.clone())
            slopes = torch.autograd.grad(losses.sum(), sides)
        return torch.stack([slope.abs() for slope in slopes]).sum(dim=0)


def split_pairs(logprobs: LogProbs) -> tuple[LogProbs, LogProbs]:
    """Undo the concatenation of chosen and rejected rows: (2B,) -> (B,), (B,)."""
    pairs = logprobs.sums.shape[0] // 2
    chosen, rejected = (LogProbs(logprobs.sums[part], logprobs.counts[part]) for part in (slice(pairs), slice(pairs, None)))
    return chosen, rejected


def tail_weights(targets: Tensor, alpha: float) -> Tensor:
    """What each target counts, where those beyond the length of the other response of a pair count only a share.

    LD-DPO, Liu et al. 2024, arXiv 2409.06411, equation 9: log p = log p(head) + a log p(tail).

    Args:
        targets: (2B, N) bool, chosen rows first.
        alpha: the share, from 0 to 1.

    Returns:
        (2B, N) float32.
    """
    counts = targets.sum(dim=1)
    shared = torch.minimum(*counts.chunk(2)).repeat(2)
    return torch.where(targets.cumsum(dim=1) <= shared[:, None], 1.0, alpha)


def confidence_weights(policy: LogProbs, collisions: Tensor) -> Tensor:
    """Weights (B,) of pairs by how likely the policy itself finds both responses, without gradients.

    WPO with its sampled alignment, Zhou et al. 2024, arXiv 2406.11827, equation 6: the product over both responses of
    exp(mean over tokens of log p(y_t) - log sum_v p_v^2).

    Args:
        policy: (2B,).
        collisions: (2B,) as `lightning_align.logprobs.response_collisions` gives them.
    """
    means = (policy.sums.detach() - collisions) / policy.counts.clamp(min=1)
    chosen, rejected = means.chunk(2)
    return (chosen + rejected).exp()


def log_ratios(policy: LogProbs, reference: LogProbs | None) -> Ratios:
    """Ratios of a batch of pairs whose first half are the chosen rows, (2B,) each; without a reference, to 1."""
    chosen, rejected = split_pairs(policy)
    delta = chosen.sums - rejected.sums
    if reference is None:
        return Ratios(chosen.sums, rejected.sums, chosen.counts, rejected.counts, delta)
    ref_chosen, ref_rejected = split_pairs(reference)
    return Ratios(chosen.sums - ref_chosen.sums, rejected.sums - ref_rejected.sums, chosen.counts, rejected.counts, delta)


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
