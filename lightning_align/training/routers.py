"""The load-balancing loss of expert routers as a part of the training loss."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_align.models.routers import Routers, recording_routers


class RouterLoss:
    """Adds the load-balancing loss of a mixture-of-experts policy to the loss of a training step.

    The loss is that of one micro-batch on one rank, over all of its real tokens (prompts, responses, and both sides of pairs),
    as in transformers. The optimizer batch has the mean over its micro-batches, weighted by what the training loss averages
    over: tokens or pairs. It is not linear in the batch, so it depends on how the batch is split.
    """

    def __init__(self, coefficient: float | None) -> None:
        """Set the coefficient.

        Args:
            coefficient: The factor on the loss. None uses the one of the policy's configuration if that asks for the loss.

        Raises:
            ValueError: If the coefficient is negative.
        """
        if coefficient is not None and not coefficient >= 0:
            raise ValueError(f"`router_aux_loss_coef` must be 0 or more, but got {coefficient}.")
        self.given = coefficient
        self.coefficient = 0.0
        """The coefficient in use. `prepare` sets it."""
        self._loss: Tensor | None = None

    def prepare(self, policy: nn.Module) -> None:
        """Choose the coefficient for a policy.

        Raises:
            ValueError: If a coefficient was given, but the policy has no routers with such a loss.
        """
        routers: Routers | None = getattr(policy, "routers", None)
        self.coefficient = self.given or 0.0
        if routers is not None and routers.function is not None:
            if self.given is None and routers.requested:
                self.coefficient = routers.coefficient or 0.0
        elif self.given:
            reason = "has no expert routers" if routers is None else "has expert routers, but transformers has no loss for them"
            raise ValueError(
                f"`router_aux_loss_coef` must be None or 0, but got {self.given}: the {type(policy).__name__} {reason}. Remove "
                "the argument."
            )

    def announce(self, policy: nn.Module) -> None:
        """Log the coefficient, or that the loss of the routers is left out."""
        routers: Routers | None = getattr(policy, "routers", None)
        if routers is None or self.given == 0:
            return
        kind = type(getattr(policy, "model", policy)).__name__
        if self.coefficient:
            rank_zero_info(
                f"{kind}: The loss includes {self.coefficient:g} times the load-balancing loss of the expert routers."
            )
        elif routers.function is None:
            rank_zero_info(f"{kind} has expert routers. Their load is not balanced: transformers has no loss for them.")
        else:
            rank_zero_info(
                f"{kind} has expert routers. Their load-balancing loss is not part of the loss. Set `router_aux_loss_coef` "
                f"to include it, such as {routers.coefficient or 0.001:g}."
            )

    @contextmanager
    def recorded(self, policy: nn.Module) -> Iterator[None]:
        """Record the routers of the policy's forward passes with gradients, if their loss is part of the loss."""
        self._loss = None
        if not self.coefficient:
            yield
            return
        with recording_routers(policy) as record:
            yield
        self._loss = None if record is None else record.loss()

    def added(self, loss_sum: Tensor, count: Tensor | int, values: dict[str, Tensor]) -> Tensor:
        """Add the loss of the recorded forward passes to a summed loss.

        Args:
            loss_sum: Scalar, the sum over the tokens or pairs of the micro-batch.
            count: How many tokens or pairs there were.
            values: The values to log. ``loss`` becomes the whole loss, and ``aux_loss`` is added, without its coefficient.

        Returns:
            The sum, a scalar.
        """
        loss, self._loss = self._loss, None
        if loss is None:
            return loss_sum
        values["loss"] = values["loss"] + self.coefficient * loss.detach()
        values["aux_loss"] = loss.detach()
        return loss_sum + self.coefficient * loss * count
