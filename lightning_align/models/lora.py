"""LoRA: low-rank terms, in named scopes, on any ``nn.Linear`` of any model.

Hu et al. 2021, arXiv 2106.09685, equation 3:  y = x W + (alpha / r) (x A) B, with A (in, r) Kaiming-uniform and B (r,
out) zero. Rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732): alpha / sqrt(r).

The linear layer stays where it is and keeps the names of its weights, so a checkpoint of the plain model still loads;
it only gains a ``lora`` child with one adapter a scope.
"""

import fnmatch
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.models.language_model import Head


@dataclass
class LoRAConfig:
    """Which layers get a low-rank term, and of what kind.

    Args:
        rank: r, the rank of the term.
        alpha: the term is scaled by alpha / rank (or alpha / sqrt(rank)).
        dropout: dropout on the input of the term.
        targets: names of linear layers, as shell patterns that match the last part or the whole of the dotted name. `*` leaves
            the output layer out, whose name has to be given.
        rslora: whether to divide by sqrt(rank) in place of rank.
        scope: name of this set of adapters.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Sequence[str] = field(default_factory=lambda: ["*"])
    rslora: bool = False
    scope: str = "default"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.rank < 1:
            raise ValueError(f"LoRA: rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout is {self.dropout}; it must be at least 0 and below 1")
        if not self.scope or "." in self.scope:
            raise ValueError(f"LoRA: scope is {self.scope!r}; it must be a name without dots")


class Adapter(nn.Module):
    """One low-rank term, (x A) B, scaled."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        """Make the term for a layer, on its device and in its dtype.

        Args:
            linear: the layer that gets it.
            config: rank, scale and dropout.
        """
        super().__init__()
        rank = config.rank
        self.scale = config.alpha / (math.sqrt(rank) if config.rslora else rank)
        self.A = nn.Parameter(linear.weight.new_empty(linear.in_features, rank))
        self.B = nn.Parameter(linear.weight.new_empty(rank, linear.out_features))
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform over its inputs, B zero: the term starts at 0."""
        bound = 1 / math.sqrt(self.A.shape[0])
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). Never the product A B: at rank 8 it would cost as much as the layer itself."""
        dropped: Tensor = self.dropout(x)
        return (dropped @ self.A) @ self.B * self.scale

    def delta(self) -> Tensor:
        """What merging adds to the layer's weight, (out, in)."""
        return (self.A @ self.B).T * self.scale


class LoRALinear(nn.Linear):
    """A linear layer with adapters; made from an ``nn.Linear`` in place by `add_lora`, never constructed."""

    lora: nn.ModuleDict
    active: tuple[str, ...]
    merged: tuple[str, ...]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): the layer and its active adapters, but for those merged into its weight."""
        y = F.linear(x, self.weight, self.bias)
        for scope in self.active:
            if scope not in self.merged:
                y = y + self.lora[scope](x)
        return y


def is_adapted(layer: nn.Module | None) -> bool:
    """Whether adapters take part in a layer's output beyond what its weight says."""
    return isinstance(layer, LoRALinear) and any(scope not in layer.merged for scope in layer.active)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name.rpartition(".")[2], p) for p in patterns)


def lora_layers(model: nn.Module, scope: str | None = None) -> list[tuple[str, LoRALinear]]:
    """Name and layer of everything that has adapters (of the scope, if one is given)."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    return [(name, layer) for name, layer in layers if scope is None or scope in layer.lora]


def _scope_layers(model: nn.Module, scope: str) -> list[LoRALinear]:
    layers = [layer for _, layer in lora_layers(model, scope)]
    if not layers:
        known = sorted({s for _, layer in lora_layers(model) for s in layer.lora})
        raise ValueError(f"LoRA: the model has no scope {scope!r}; it has {known or 'none'}: add it with add_lora")
    return layers


def add_lora(model: nn.Module, config: LoRAConfig, *, active: bool = True) -> list[str]:
    """Add a scope of adapters to the linear layers that the patterns name. Freezes nothing: see `train_only`.

    Args:
        model: changed in place.
        config: which layers, and of what kind.
        active: whether the scope is used at once, beside those in use.

    Returns:
        Names of the layers that got an adapter.

    Raises:
        ValueError: if no layer matches, or a layer has this scope already.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = [name for name in linears if _matches(name, config.targets) and ".lora." not in f".{name}."]
    # With an adapter on it, the output layer is no longer a weight from which log-probs come in pieces.
    named, head = [pattern for pattern in config.targets if pattern != "*"], getattr(model, "head", None)
    if isinstance(head, Head):
        names = [name for name in names if linears[name].weight is not head.weight or _matches(name, named)]
    if not names:
        raise ValueError(
            f"LoRA: targets {list(config.targets)} match none of the linear layers "
            f"{sorted({name.rpartition('.')[2] for name in linears})} (`*` does not stand for the output layer)"
        )
    for name in names:
        layer = linears[name]
        if not isinstance(layer, LoRALinear):
            if type(layer) is not nn.Linear:
                raise ValueError(f"LoRA: {name} is a {type(layer).__name__}, a subclass of Linear whose forward would be lost")
            layer.__class__ = LoRALinear
            assert isinstance(layer, LoRALinear)
            layer.lora, layer.active, layer.merged = nn.ModuleDict().train(layer.training), (), ()
        if config.scope in layer.lora:
            raise ValueError(f"LoRA: {name} has a scope {config.scope!r} already; remove it first or name another")
        adapter = Adapter(layer, config)
        adapter.train(layer.training)
        layer.lora[config.scope] = adapter
        if active:
            layer.active = (*layer.active, config.scope)
    return names


def use_lora(model: nn.Module, *scopes: str) -> None:
    """Make these scopes, and no others, take part in the forward pass (none: the plain model)."""
    for scope in scopes:
        _scope_layers(model, scope)
    for _, layer in lora_layers(model):
        layer.active = tuple(scope for scope in scopes if scope in layer.lora)


@contextmanager
def using_lora(model: nn.Module, *scopes: str) -> Iterator[None]:
    """`use_lora` for the length of a block, then as it was. Without scopes the adapters are off."""
    before = [(layer, layer.active) for _, layer in lora_layers(model)]
    merged = sorted({scope for layer, _ in before for scope in layer.merged if scope not in scopes})
    if merged:
        raise ValueError(f"LoRA: scopes {merged} are merged into the weights and cannot be switched off: unmerge_lora first")
    try:
        use_lora(model, *scopes)
        yield
    finally:
        for layer, active in before:
            layer.active = active


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """The plain model for the length of a block: what a reference policy needs when only adapters train."""
    with using_lora(model):
        yield


@torch.no_grad()
def merge_lora(model: nn.Module, scope: str) -> None:
    """Add a scope into the weights; its adapters stay, unused, so that `unmerge_lora` can take them out (to rounding)."""
    for layer in _scope_layers(model, scope):
        if scope in layer.merged:
            raise ValueError(f"LoRA: scope {scope!r} is merged already")
        layer.weight += layer.lora[scope].delta()  # type: ignore[operator]  # a ModuleDict holds plain modules
        layer.merged = (*layer.merged, scope)


@torch.no_grad()
def unmerge_lora(model: nn.Module, scope: str) -> None:
    """Take a merged scope out of the weights again."""
    for layer in _scope_layers(model, scope):
        if scope not in layer.merged:
            raise ValueError(f"LoRA: scope {scope!r} is not merged")
        layer.weight -= layer.lora[scope].delta()  # type: ignore[operator]  # as above
        layer.merged = tuple(s for s in layer.merged if s != scope)


def remove_lora(model: nn.Module, scope: str) -> None:
    """Delete a scope. If it was merged, the weights keep it."""
    for layer in _scope_layers(model, scope):
        del layer.lora[scope]
        layer.active = tuple(s for s in layer.active if s != scope)
        layer.merged = tuple(s for s in layer.merged if s != scope)
        if not layer.lora:
            del layer.lora, layer.active, layer.merged
            layer.__class__ = nn.Linear  # type: ignore[assignment]  # what it was


def lora_parameters(model: nn.Module, scope: str) -> list[nn.Parameter]:
    """Parameters of a scope, in the order of the model (a list: a set would differ from rank to rank)."""
    return [parameter for layer in _scope_layers(model, scope) for parameter in layer.lora[scope].parameters()]


def train_only(model: nn.Module, scope: str) -> None:
    """Freeze everything but a scope."""
    model.requires_grad_(False)
    for parameter in lora_parameters(model, scope):
        parameter.requires_grad_(True)
