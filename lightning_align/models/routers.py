"""The load-balancing loss of mixture-of-experts models.

Switch Transformers, Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6. Over the tokens of a batch and all layers with E
experts, of which each token uses k, the loss is E sum_e f_e P_e. Here f_e is the number of times that expert e was chosen per
token and layer, and P_e is the mean of its router probability. Balanced routers have a loss of k, its smallest value.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[[tuple[Tensor, ...], int, int], Tensor]
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""The names of the coefficient in models and configurations of transformers."""


@dataclass
class Routers:
    """What a model of transformers says about the loss of its routers."""

    function: LossFunction | None
    """The loss of its family from the router logits of each layer (T, E), E and k. None if transformers has none."""
    num_experts: int
    """The number of experts E."""
    top_k: int
    """The number of experts per token, k."""
    coefficient: float | None
    """The coefficient of the configuration, or None if it has none."""
    requested: bool
    """Whether the configuration asks for the loss (``output_router_logits``)."""


class RouterRecord:
    """The router logits of the forward passes of one training step."""

    def __init__(self, routers: Routers) -> None:
        """Start without forward passes.

        Args:
            routers: The routers of the model.
        """
        self.routers = routers
        self.mask: Tensor | None = None
        """(B, N) bool, true at the real tokens of the next forward pass. Set by whoever knows the padding."""
        self._passes: list[tuple[Tensor, ...]] = []

    def add(self, logits: tuple[Tensor, ...], mask: Tensor | None) -> None:
        """Keep the router logits of a forward pass, without those of padding.

        Args:
            logits: (B N, E) or (B, N, E) router logits of each layer with experts.
            mask: (B, N) bool, true at real tokens, or None if all are real.
        """
        mask, self.mask = self.mask if mask is None else mask, None
        flat = tuple(layer.reshape(-1, layer.shape[-1]) for layer in logits)
        if mask is not None and mask.ndim == 2 and mask.numel() == len(flat[0]):
            where = mask.flatten().nonzero().squeeze(-1)
            flat = tuple(layer.index_select(0, where.to(layer.device)) for layer in flat)
        self._passes.append(flat)

    def loss(self) -> Tensor | None:
        """Return the loss over the real tokens of all forward passes together, a scalar. None if there was no pass."""
        if not self._passes or self.routers.function is None:
            return None
        layers = tuple(torch.cat(parts) for parts in zip(*self._passes, strict=True))
        layers = tuple(layer.to(torch.promote_types(layer.dtype, torch.float32)) for layer in layers)
        with torch.autocast(layers[0].device.type, enabled=False):
            return self.routers.function(layers, self.routers.num_experts, self.routers.top_k)


def find_routers(model: Any) -> Routers | None:
    """Return the routers of a model of transformers, or None if it has no experts.

    Args:
        model: The model with its output layer, which says how many experts there are.
    """
    text = model.config.get_text_config(decoder=True)
    experts = _first(model, text, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))
    top_k = _first(model, text, ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_top_k", "num_experts_per_token"))
    if not isinstance(experts, int) or experts < 2 or not _has_experts(model):
        return None
    coefficient = _first(model, text, COEFFICIENTS)
    return Routers(
        function=_function_of(model) if isinstance(top_k, int) else None,
        num_experts=experts,
        top_k=top_k if isinstance(top_k, int) else 0,
        coefficient=float(coefficient) if isinstance(coefficient, (int, float)) else None,
        requested=bool(getattr(text, "output_router_logits", False) or getattr(model.config, "output_router_logits", False)),
    )


def _first(model: Any, text: Any, names: tuple[str, ...]) -> Any:
    """Return the first of some attributes that the model or its text configuration has."""
    return next((value for owner in (model, text) for name in names if (value := getattr(owner, name, None)) is not None), None)


def _has_experts(model: nn.Module) -> bool:
    """Return whether a model has a module of experts. Configurations of dense models may have a number of experts too."""
    return any(
        "expert" in name.rpartition(".")[2].lower()
        or "expert" in type(module).__name__.lower()
        or "router" in type(module).__name__.lower()
        for name, module in model.named_modules()
    )


def _function_of(model: Any) -> LossFunction | None:
    """Return the load-balancing loss of the family, if it takes router logits, E and k."""
    function: Any = getattr(sys.modules.get(type(model).__module__), "load_balancing_loss_func", None)
    if function is None or list(inspect.signature(function).parameters)[:3] != ["gate_logits", "num_experts", "top_k"]:
        return None
    found: LossFunction = function
    return found


@contextmanager
def recording_routers(model: nn.Module) -> Iterator[RouterRecord | None]:
    """Record the router logits of a model's forward passes with gradients within a ``with`` block.

    Args:
        model: A model with ``routers`` (see `Routers`), such as a `PretrainedLM`. Others record nothing.
    """
    routers = getattr(model, "routers", None)
    if routers is None or routers.function is None:
        yield None
        return
    owner: Any = model
    owner.router_record = record = RouterRecord(routers)
    try:
        yield record
    finally:
        owner.router_record = None


def announce_mask(model: nn.Module, mask: Tensor) -> None:
    """Tell a model that records its routers which tokens of its next forward pass are real.

    Args:
        model: Any model.
        mask: (B, N) bool, true at real tokens.
    """
    if (record := getattr(model, "router_record", None)) is not None:
        record.mask = mask
