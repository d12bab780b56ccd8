"""A check that adapters have an effect: some models read the weights of layers without calling them."""

import torch
from torch import nn

from lightning_align.models.language_model import logits_of, vocabulary_size
from lightning_align.models.lora import LoRALayer, lora_layers


def check_layers_called(model: nn.Module, scope: str) -> None:
    """Check that a model calls the layers that have adapters, and does not only read their weights, as Mamba does.

    The adapter of such a layer would not train, and merging would not change anything that was trained.

    Args:
        model: The model. Its weights and modes are as before afterwards.
        scope: The scope of the adapters.

    Raises:
        ValueError: If the adapter of a layer would have no effect.
    """
    weight = next(model.parameters())
    if any(parameter.is_meta for parameter in model.parameters()) or not getattr(model, "is_loaded", True):
        return
    tokens = torch.arange(min(8, vocabulary_size(model) or 2), device=weight.device)[None]
    layers, called = lora_layers(model, scope), set()
    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers]
    model.eval()
    try:
        with torch.no_grad():
            before = logits_of(model, tokens)
            for hook in hooks:
                hook.remove()
            silent = [(name, layer) for name, layer in layers if name not in called]
            # All at once: the layers of experts that got no token are many.
            if silent and _are_read(model, [layer for _, layer in silent], tokens, before):
                read = [name for name, layer in silent if _are_read(model, [layer], tokens, before)]
                raise ValueError(
                    f"LoRA: {', '.join(read[:3])} cannot have an adapter, because the model reads its weight and does not call "
                    "the layer. Leave it out of `targets`."
                )
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training


def _are_read(model: nn.Module, layers: list[LoRALayer], tokens: torch.Tensor, before: torch.Tensor) -> bool:
    """Return whether the logits change with the weights of layers."""
    kept = [layer.weight.detach().clone() for layer in layers]
    for layer, weight in zip(layers, kept, strict=True):
        layer.weight.add_(weight.std() + 0.1)
    try:
        difference = (logits_of(model, tokens) - before).abs().max()
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.copy_(weight)
    return not float(difference) <= 1e-3 * float(before.std())
