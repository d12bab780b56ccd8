"""The weights of a model as one state dict, with its adapters merged."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_align.models.composed import own_state
from lightning_align.models.lora import lora_layers
from lightning_align.models.peft_adapters import has_peft, unload_peft
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.weights import load_weights


def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Copy all weights to the CPU, each to its own memory. If they are sharded, all ranks must call this (a collective).

    Of a composed model, these are the weights of its connections; see `lightning_align.models.composed`.

    Args:
        model: The model.
        keep: Whether this rank wants them. If not, the result is empty, and the rank never holds more than one weight.
    """
    weights = {}
    for name, value in own_state(model).items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            weights[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return weights


def plain_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without those of the LoRA adapters of this package."""
    return {name: value for name, value in weights.items() if ".lora." not in f".{name}"}


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the active adapters into the weights, and return them under the names of the model without adapters.

    A layer with an adapter that is tied to another layer gets its own weight. `write_model` notices that they differ.

    Args:
        model: The model, which says which adapters are active.
        weights: Its weights, from `whole_weights`. They are not changed.
    """
    plain = plain_weights(weights)
    for name, layer in lora_layers(model):
        for scope in layer.active:
            if scope in layer.merged:
                continue
            adapter = f"{name}.lora.{scope}"
            term = layer.lora[scope].delta_of(weights[f"{adapter}.A"], weights[f"{adapter}.B"])  # type: ignore[operator]
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + term
    return plain


def transformers_weights(model: PretrainedLM, weights: Mapping[str, Tensor]) -> tuple[PretrainedLM, dict[str, Tensor]]:
    """Return the weights under the names that transformers uses, with PEFT adapters merged, and the model that they fit.

    Args:
        model: The model. It may be sharded and is not changed.
        weights: Its weights, from `merged_weights`.

    Returns:
        The model without PEFT adapters (a copy if it has any), and its weights.
    """
    if has_peft(model.model):
        model = without_peft(model, weights, merge=True)
        weights = whole_weights(model)
    return model, {name.removeprefix("model."): value for name, value in weights.items()}


def without_peft(model: PretrainedLM, weights: Mapping[str, Tensor], *, merge: bool) -> PretrainedLM:
    """Return a copy of a model without its PEFT adapters. The model is not changed, because it may be sharded.

    Args:
        model: A model with PEFT adapters.
        weights: Its weights, from `whole_weights`.
        merge: Whether to merge the adapters into the weights, or to leave them out.
    """
    arguments: dict[str, Any] = {**model.init_args, "gradient_checkpointing": False}
    copied = PretrainedLM(**arguments)
    load_weights(copied, dict(weights), "the weights to merge")
    unload_peft(copied.model, merge=merge)
    return copied


def embedding_names(model: PretrainedLM) -> tuple[str, str]:
    """Return the names that transformers uses for the weights of the embedding and of the output layer."""
    inner = model.model
    names = {id(module): name for name, module in inner.named_modules(remove_duplicate=False)}
    first, second = (names.get(id(layer)) for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()))
    return f"{first}.weight", f"{second}.weight"
