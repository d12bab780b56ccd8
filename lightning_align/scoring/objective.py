"""The objective on pairs: one or several losses, with a divergence, margins and weights."""

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
"""A pair is saturated if its slope is below this share of the slope at the reference. For the sigmoid loss, which has half of
its largest slope at the reference, this means s(b d) > 0.99."""


def diverge(ratios: Ratios, divergence: Divergence, *, alpha: float = 0.5) -> Ratios:
    """Replace the log-ratios by the scores f'(p/q) of another divergence.

    DPO for other divergences, Wang et al. 2023, arXiv 2309.16240:

    - ``reverse_kl``: r.
    - ``forward_kl``: 1 - exp(-r).
    - ``js``: log 2 + log s(r).
    - ``alpha``: (exp((a - 1) r) - 1) / (a - 1). It is ``forward_kl`` for a = 0, and goes to ``reverse_kl`` as a goes to 1.

    Exponents are cut at 80, because exp(88) is near the largest float32 number.

    Args:
        ratios: The log-ratios of B pairs.
        divergence: The name of the divergence.
        alpha: The parameter a of the ``alpha`` divergence. Must not be 1.

    Raises:
        ValueError: If the divergence is unknown.
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
        raise ValueError(f"`divergence` must be one of {', '.join(get_args(Divergence))}, but got {divergence!r}.")

    return ratios._replace(chosen=score(ratios.chosen), rejected=score(ratios.rejected))


class Objective:
    """One loss, or a weighted sum of several losses, with a divergence. The arguments are checked once, at construction.

    A margin m of a pair replaces b d by b d - m (Touvron et al. 2023, arXiv 2307.09288, equation 2).
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
        """Set up the objective.

        Args:
            loss: The name of a loss, or a dictionary from names to weights.
            beta: The factor on the log-ratios. See the losses.
            label_smoothing: The assumed share of flipped labels. At least one of the losses must have label smoothing. The
                others ignore it.
            loss_args: Further arguments of the losses, by name: `temperature` of discopop, `penalty` of dpop, `gamma` of simpo.
            divergence: The divergence between policy and reference.
            divergence_alpha: The parameter of the alpha divergence.

        Raises:
            ValueError: If a loss does not support the given values, or the losses cannot be combined.
        """
        self.weights: dict[str, float] = {loss: 1.0} if isinstance(loss, str) else dict(loss)
        if not self.weights or any(not weight > 0 for weight in self.weights.values()):
            raise ValueError(f"`loss` must be a name, or names with weights above 0, but got {self.weights}.")
        smoothed = [name for name in self.weights if name in SMOOTHED]
        for name in self.weights:
            # Some of several losses may have no smoothing. If none has it, the check of the first one raises.
            check_loss(name, beta=beta, label_smoothing=label_smoothing if name in smoothed or not smoothed else 0.0)
        free = [name for name in self.weights if name in REFERENCE_FREE]
        if free and len(free) < len(self.weights):
            others = [name for name in self.weights if name not in free]
            raise ValueError(
                f"`loss` must not mix losses without a reference ({', '.join(free)}) and losses with a reference "
                f"({', '.join(others)}). Use only one kind."
            )
        if divergence not in get_args(Divergence):
            raise ValueError(f"`divergence` must be one of {', '.join(get_args(Divergence))}, but got {divergence!r}.")
        if divergence == "alpha" and divergence_alpha == 1:
            raise ValueError(
                "`divergence_alpha` must not be 1, because that divergence is the reverse KL. Use `divergence: reverse_kl`."
            )
        unfit = [name for name in self.weights if name not in IN_DELTA]
        if divergence != "reverse_kl" and unfit:
            raise ValueError(
                f"`divergence` must be reverse_kl with the loss {', '.join(unfit)}, but got {divergence}. Other divergences "
                f"need one of {', '.join(IN_DELTA)}."
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
                f"`loss_args` must only have arguments of {', '.join(self.weights)} ({', '.join(sorted(known)) or 'none'}), "
                f"but got {', '.join(unknown)}."
            )
        return terms

    def __call__(self, ratios: Ratios, *, weights: Tensor | None = None, margins: Tensor | None = None) -> Tensor:
        """Compute the loss of each pair.

        Args:
            ratios: The log-ratios of B pairs.
            weights: (B,) factor on the loss of each pair.
            margins: (B,) margin m of each pair, by which b d should exceed 0.

        Returns:
            (B,) losses.

        Raises:
            ValueError: If there are margins or weights, but the loss does not support them.
        """
        ratios = diverge(ratios, self._divergence, alpha=self._alpha)
        if margins is not None:
            if self._no_margin:
                raise ValueError(
                    f"The rows must not have margins, because the loss {self._no_margin[0]} does not support them. Drop the "
                    "column of margins."
                )
            shift = margins / self._beta
            # Normalized losses divide the sums by the lengths. Scaling by the length makes up for it.
            normalized = {"sigmoid_norm", "ipo"} & self.weights.keys()
            if normalized and len(normalized) < len(self.weights):
                raise ValueError(
                    f"The rows must not have margins with the losses {', '.join(self.weights)}, because some are normalized by "
                    "length and others are not, so the scales of the margins differ. Drop the column of margins, or use only "
                    "one kind of loss."
                )
            scale = ratios.chosen_lengths.clamp(min=1) if normalized else 1
            ratios = ratios._replace(chosen=ratios.chosen - shift * scale)
        if weights is not None and self._sorted:
            raise ValueError(
                f"The pairs must not have weights, because the loss {self._sorted[0]} has no loss per pair. Drop the weights, "
                "or use another loss."
            )
        losses = torch.stack([weight * term(ratios) for weight, term in self._terms]).sum(dim=0)
        return losses if weights is None else losses * weights

    def saturated(self, ratios: Ratios, *, margins: Tensor | None = None) -> Tensor:
        """Return which pairs have (almost) no gradient left: less than `SATURATED` times their gradient at the reference.

        Args:
            ratios: The log-ratios of B pairs.
            margins: (B,) margin of each pair.

        Returns:
            (B,) bool.
        """
        start = ratios._replace(chosen=torch.zeros_like(ratios.chosen), rejected=torch.zeros_like(ratios.rejected))
        return self._slopes(ratios, margins) < SATURATED * self._slopes(start, margins)

    def _slopes(self, ratios: Ratios, margins: Tensor | None) -> Tensor:
        """Compute |dL/dr_w| + |dL/dr_l| of each pair (B,)."""
        # Validation runs in inference mode. Autograd works only on copies of its tensors, made outside of this mode.
        with torch.inference_mode(False), torch.enable_grad():
            fixed = Ratios(*(None if part is None else part.detach().clone() for part in ratios))  # type: ignore[arg-type]
            sides = fixed.chosen.requires_grad_(), fixed.rejected.requires_grad_()
            if fixed.policy_delta is not None:
                # The value of `policy_delta` stays the same. Its derivative becomes that of d, since log q is constant.
                fixed = fixed._replace(policy_delta=fixed.policy_delta + fixed.delta - fixed.delta.detach())
            losses = self(fixed, margins=None if margins is None else margins.clone())
            slopes = torch.autograd.grad(losses.sum(), sides)
        return torch.stack([slope.abs() for slope in slopes]).sum(dim=0)
