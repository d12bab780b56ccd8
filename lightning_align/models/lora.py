"""LoRA: low-rank adapters, grouped in named scopes, for any linear layer of any model.

Hu et al. 2021, arXiv 2106.09685, equation 3:  y = x W + (alpha / r) (x A) B. A is (in, r) and initialized Kaiming-uniform.
B is (r, out) and initialized with zeros. Rank-stabilized LoRA (Kalajdzievski 2023, arXiv 2312.03732) uses alpha / sqrt(r).

An adapted linear layer stays in place and its weights keep their names, so a checkpoint of the plain model still loads. The
layer only gets a child module ``lora`` with one adapter per scope.
"""

import fnmatch
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.models.deferred import recipe_of
from lightning_align.models.language_model import Head
from lightning_align.models.ties import untie
from lightning_align.runtime.kinds import check_kinds, hints_of


@dataclass
class LoRAConfig:
    """The configuration of a scope of LoRA adapters.

    Args:
        rank: The rank r of the low-rank matrices A and B.
        alpha: The scale of the adapters. Their output is multiplied by alpha / rank (or alpha / sqrt(rank) with `rslora`).
        dropout: The dropout probability on the input of the adapters.
        targets: The linear layers that get an adapter, as shell patterns. A pattern matches the last part of the dotted name or
            the whole name. `*` excludes the output layer, which must be named to get an adapter, and the parts of a model of
            images and text that text does not reach.
        rslora: Whether to scale by alpha / sqrt(rank) instead of alpha / rank (rank-stabilized LoRA).
        scope: The name of this set of adapters.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Sequence[str] = field(default_factory=lambda: ["*"])
    rslora: bool = False
    scope: str = "default"

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_kinds("LoRAConfig", hints_of(type(self)), vars(self))
        if self.rank < 1:
            raise ValueError(f"LoRA: `rank` must be at least 1, but got {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: `dropout` must be at least 0 and less than 1, but got {self.dropout}.")
        if not self.scope or "." in self.scope:
            raise ValueError(f"LoRA: `scope` must be a name without dots, but got {self.scope!r}.")


class Adapter(nn.Module):
    """One low-rank adapter: the term (x A) B, scaled."""

    def __init__(self, linear: nn.Module, config: LoRAConfig) -> None:
        """Create the adapter of a layer, with the layer's device and dtype.

        Args:
            linear: The layer that gets the adapter: an ``nn.Linear``, or a Conv1D of transformers.
            config: The rank, scale and dropout of the adapter.
        """
        super().__init__()
        rank = config.rank
        self.scale = config.alpha / (math.sqrt(rank) if config.rslora else rank)
        inputs, outputs = features(linear)
        weight: Any = linear.weight
        self.transposed = not isinstance(linear, nn.Linear)
        """Whether the weight of the layer is (in, out), as in a Conv1D, and not (out, in)."""
        # An adapter is small. It has its values at once, also where the weights of the layer are made after sharding.
        where = {"dtype": weight.dtype, "device": "cpu" if recipe_of(weight) is not None else weight.device}
        self.A = nn.Parameter(torch.empty(inputs, rank, **where))
        self.B = nn.Parameter(torch.empty(rank, outputs, **where))
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize A Kaiming-uniform over its inputs and B with zeros, so that the output of the adapter starts at 0."""
        bound = 1 / math.sqrt(self.A.shape[0])
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (x A) B, scaled: (..., in) -> (..., out).

        The product A B is never formed: at rank 8 it would cost as much as the layer itself.
        """
        dropped: Tensor = self.dropout(x)
        # The r columns are scaled and not the outputs, of which there are a hundred times as many.
        return (dropped @ self.A * self.scale) @ self.B

    def delta(self) -> Tensor:
        """Return the matrix that merging adds to the layer's weight, in the shape of that weight."""
        return self.delta_of(self.A, self.B)

    def delta_of(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the matrix that merging would add for other values (in, r) and (r, out) of A and B."""
        product = a @ b * self.scale
        return product if self.transposed else product.T


class LoRALayer(nn.Module):
    """A layer with adapters. `add_lora` turns a layer into one in place. It is never constructed directly."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora: nn.ModuleDict
    active: tuple[str, ...]
    merged: tuple[str, ...]
    plain: type[nn.Module] = nn.Linear
    """The class of the layer without adapters."""

    def apply_weight(self, x: Tensor) -> Tensor:
        """Apply the layer without adapters."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and those of its active adapters that are not merged into its weight: (..., in) -> (..., out)."""
        y = self.apply_weight(x)
        for scope in self.active:
            if scope not in self.merged:
                y = y + self.lora[scope](x)
        return y


class LoRALinear(LoRALayer, nn.Linear):  # type: ignore[misc]  # both declare the type of `bias`
    """A linear layer with adapters."""


_CLASSES: dict[type[nn.Module], type[LoRALayer]] = {nn.Linear: LoRALinear}


def _lora_class(kind: type[nn.Module]) -> type[LoRALayer] | None:
    """Return the class with adapters for a class of layers, or None if there is none."""
    if kind in _CLASSES:
        return _CLASSES[kind]
    if kind.__name__ == "FalconLinear" and issubclass(kind, nn.Linear):

        class LoRAFalconLinear(LoRALayer, kind):  # type: ignore[misc, valid-type]  # known at run time only
            """The linear layer of Falcon with adapters. It rounds in 16 bits in its own way."""

            plain = kind

            def apply_weight(self, x: Tensor) -> Tensor:
                y: Tensor = kind.forward(self, x)
                return y

        _CLASSES[kind] = LoRAFalconLinear
        return LoRAFalconLinear
    if kind.__name__ != "Conv1D" or kind.__module__ != "transformers.pytorch_utils":
        return None

    class LoRAConv1D(LoRALayer, kind):  # type: ignore[misc, valid-type]  # known at run time only
        """A Conv1D of transformers (GPT-2) with adapters: a linear layer with the weight (in, out)."""

        plain = kind

        def apply_weight(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.T, self.bias)

    _CLASSES[kind] = LoRAConv1D
    return LoRAConv1D


def features(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer or of a Conv1D of transformers."""
    weight = layer.weight
    assert isinstance(weight, Tensor) and weight.ndim == 2
    outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
    return inputs, outputs


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return all layers that an adapter fits by their structure, by name: linear layers, and Conv1D layers of transformers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | LoRALayer) or _lora_class(type(module)) is not None
    }


def is_adapted(layer: nn.Module | None) -> bool:
    """Return whether a layer has active adapters that are not merged into its weight."""
    return isinstance(layer, LoRALayer) and any(scope not in layer.merged for scope in layer.active)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name.rpartition(".")[2], p) for p in patterns)


def lora_layers(model: nn.Module, scope: str | None = None) -> list[tuple[str, LoRALayer]]:
    """Return the name and layer of each linear layer that has adapters, or adapters of the given scope."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer)]
    return [(name, layer) for name, layer in layers if scope is None or scope in layer.lora]


def _scope_layers(model: nn.Module, scope: str) -> list[LoRALayer]:
    layers = [layer for _, layer in lora_layers(model, scope)]
    if not layers:
        known = sorted({s for _, layer in lora_layers(model) for s in layer.lora})
        raise ValueError(
            f"LoRA: the model has no scope {scope!r}. Its scopes are {known or 'none'}. Pass one of these, or add the scope "
            "with add_lora."
        )
    return layers


def _other_parts(model: nn.Module) -> set[int]:
    """Return the ids of the layers of a model of images and text that text does not reach, such as those of a vision tower."""
    if not getattr(model, "composite", False):
        return set()
    inner: Any = model.model
    used = {id(module) for part in (model.decoder, inner.get_output_embeddings()) for module in part.modules()}  # type: ignore[union-attr]
    return {id(module) for module in model.modules()} - used


def add_lora(model: nn.Module, config: LoRAConfig, *, active: bool = True) -> list[str]:
    """Add a scope of adapters to the linear layers that match ``config.targets``.

    This freezes no parameters. Use `train_only` for that.

    Args:
        model: The model. It is changed in place.
        config: The configuration of the adapters.
        active: Whether to activate the scope, in addition to the scopes that are active already.

    Returns:
        The names of the layers that got an adapter.

    Raises:
        ValueError: If no layer matches, or a layer already has this scope.
    """
    linears = linear_layers(model)
    names = [name for name in linears if _matches(name, config.targets) and ".lora." not in f".{name}."]
    # Log-probs are computed in chunks from the weight of the output layer, which is not possible with an adapter on it. So
    # `*` excludes the output layer.
    named, head = [pattern for pattern in config.targets if pattern != "*"], getattr(model, "head", None)
    frozen = _other_parts(model)
    names = [name for name in names if id(linears[name]) not in frozen or _matches(name, named)]
    if isinstance(head, Head):
        names = [name for name in names if linears[name].weight is not head.weight or _matches(name, named)]
    if not names:
        raise ValueError(
            f"LoRA: `targets` must match linear layers of the model, but {list(config.targets)} match none of "
            f"{sorted({name.rpartition('.')[2] for name in linears})}. `*` excludes the output layer. To adapt it, name it."
        )
    for name in names:
        layer = linears[name]
        if not isinstance(layer, LoRALayer):
            adapted = _lora_class(type(layer))
            if adapted is None:
                raise ValueError(
                    f"LoRA: {name} must be an nn.Linear, but is a {type(layer).__name__}. An adapter would replace the forward "
                    "of this subclass. Leave the layer out of `targets`."
                )
            layer.__class__ = adapted
            assert isinstance(layer, LoRALayer)
            layer.lora, layer.active, layer.merged = nn.ModuleDict().train(layer.training), (), ()
        if config.scope in layer.lora:
            raise ValueError(
                f"LoRA: {name} already has a scope {config.scope!r}. Remove it with remove_lora, or pass another `scope`."
            )
        adapter = Adapter(layer, config)
        adapter.train(layer.training)
        layer.lora[config.scope] = adapter
        if active:
            layer.active = (*layer.active, config.scope)
    return names


def use_lora(model: nn.Module, *scopes: str) -> None:
    """Activate these scopes and deactivate all others. Without scopes, the forward pass is that of the plain model."""
    for scope in scopes:
        _scope_layers(model, scope)
    for _, layer in lora_layers(model):
        layer.active = tuple(scope for scope in scopes if scope in layer.lora)


@contextmanager
def using_lora(model: nn.Module, *scopes: str) -> Iterator[None]:
    """Activate only these scopes within a ``with`` block, and restore the active scopes at its end.

    Without scopes, the adapters are off within the block.

    Raises:
        ValueError: If a scope that would be switched off is merged into the weights, or the model lacks a scope.
    """
    before = [(layer, layer.active) for _, layer in lora_layers(model)]
    merged = sorted({scope for layer, _ in before for scope in layer.merged if scope not in scopes})
    if merged:
        raise ValueError(
            f"LoRA: scopes {merged} cannot be switched off, because they are merged into the weights. Call unmerge_lora first."
        )
    try:
        use_lora(model, *scopes)
        yield
    finally:
        for layer, active in before:
            layer.active = active


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off within a ``with`` block. If only adapters train, the model is then the reference policy."""
    with using_lora(model):
        yield


@torch.no_grad()
def merge_lora(model: nn.Module, scope: str) -> None:
    """Merge a scope into the weights.

    The adapters stay in the model, unused, so that `unmerge_lora` can undo the merge up to rounding. A layer that shares its
    weight with another layer, such as a tied output layer, gets its own weight.
    """
    for layer in _scope_layers(model, scope):
        if scope in layer.merged:
            raise ValueError(f"LoRA: scope {scope!r} is already merged. Call unmerge_lora first.")
        untie(model, layer)
        layer.weight.add_(layer.lora[scope].delta())  # type: ignore[operator]  # a ModuleDict holds plain modules
        layer.merged = (*layer.merged, scope)


@torch.no_grad()
def unmerge_lora(model: nn.Module, scope: str) -> None:
    """Subtract a merged scope from the weights."""
    for layer in _scope_layers(model, scope):
        if scope not in layer.merged:
            raise ValueError(f"LoRA: scope {scope!r} is not merged. Call merge_lora first.")
        layer.weight.sub_(layer.lora[scope].delta())  # type: ignore[operator]  # as above
        layer.merged = tuple(s for s in layer.merged if s != scope)


def remove_lora(model: nn.Module, scope: str) -> None:
    """Delete a scope. If it was merged, it stays in the weights."""
    for layer in _scope_layers(model, scope):
        del layer.lora[scope]
        layer.active = tuple(s for s in layer.active if s != scope)
        layer.merged = tuple(s for s in layer.merged if s != scope)
        if not layer.lora:
            del layer.lora, layer.active, layer.merged
            layer.__class__ = layer.plain  # type: ignore[assignment]  # its class before add_lora


def lora_parameters(model: nn.Module, scope: str) -> list[nn.Parameter]:
    """Return the parameters of a scope in the order of the model. The order is the same on every rank."""
    return [parameter for layer in _scope_layers(model, scope) for parameter in layer.lora[scope].parameters()]


def train_only(model: nn.Module, scope: str) -> None:
    """Freeze all parameters except those of one scope."""
    model.requires_grad_(False)
    for parameter in lora_parameters(model, scope):
        parameter.requires_grad_(True)
