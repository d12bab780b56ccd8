"""One loss or several, with divergence, margins and weights."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_align.scoring.losses import IN_DELTA, LOSSES, REFERENCE_FREE, SMOOTHED, SORTED, check_loss
from lightning_align.scoring.ratios import Ratios

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
SATURATED = 0.02
"""Of the slope at the reference; the sigmoid loss, whose slope there is half of the largest, has less where s(b d) > 0.99."""


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
