"""Tied layers: layers that share one weight, as the embedding and the output layer of many models do."""

import torch
from torch import nn


def untie(model: nn.Module, layer: nn.Module) -> bool:
    """Give a layer its own copy of a weight that it shares with another layer.

    An adapter changes one of two tied layers. Merged into the shared weight, it would change both. A `PretrainedLM` then says
    in its configuration that its layers are not tied.

    Args:
        model: The model that contains the layer. It is changed in place.
        layer: A layer with a parameter ``weight``.

    Returns:
        Whether the weight was shared.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    owners = [module for module in model.modules() for value in module._parameters.values() if value is weight]
    if len(owners) < 2:
        return False
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    _say_untied(model)
    return True


def _say_untied(model: nn.Module) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]  # a configuration of transformers
    described = getattr(model, "init_args", {}).get("config")
    if isinstance(described, dict) and described.get("tie_word_embeddings"):
        described["tie_word_embeddings"] = False


def tie_again(model: nn.Module, embedding: nn.Module, head: nn.Module) -> None:
    """Share the weight of two layers again that `untie` parted, if it is still the same.

    Args:
        model: The model of transformers that contains them. It is changed in place.
        embedding: The embedding.
        head: The output layer.
    """
    if torch.equal(embedding.weight, head.weight):  # type: ignore[arg-type]  # both have one
        head.weight = embedding.weight
        for module in model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "tie_word_embeddings", None) is False:
                config.tie_word_embeddings = True  # type: ignore[union-attr]  # a configuration of transformers
