"""Gradient checkpointing of a composition: the anchor's layers keep their inputs only, and run again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. The anchor is frozen and stays in
evaluation mode, in which the checkpointing of transformers does nothing. The augments need none, because they are read without
gradients. The connections run once: they are added by hooks, which are outside of what is computed again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.layers import Layer, Position
from lightning_align.models.activations import Run, checkpointed


def asks_for_checkpointing(model: nn.Module) -> bool:
    """Return whether a model was built with gradient checkpointing, as the models of transformers record it."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def recomputed_layers(
    model: nn.Module, layers: Sequence[Layer], places: Sequence[tuple[int, Position]], wanted: bool | None
) -> list[tuple[nn.Module, Run]]:
    """Return how each layer of the anchor runs with gradient checkpointing.

    Layers above the first connection are computed again. Those below it get no gradients, although the models of transformers
    ask for gradients of their embeddings with gradient checkpointing.

    Args:
        model: The anchor.
        layers: Its layers.
        places: The layer, counted from 1, and the position of each connection.
        wanted: Whether to use gradient checkpointing. None if the anchor decides.

    Returns:
        The modules of the layers, each with the function that runs it. None without gradient checkpointing.

    Raises:
        ValueError: If the layers cannot be computed again, because they contain points at which a composition reads or adds.
    """
    if not (asks_for_checkpointing(model) if wanted is None else wanted):
        return []
    first, at = min(places)
    below = first if at == "output" else first - 1
    found = {
        part: _without_gradients if number <= below else checkpointed
        for number, layer in enumerate(layers, start=1)
        for part in layer.parts
    }
    sites = {site.module for layer in layers for site in (layer.before, layer.after)}
    if not found or any(inner in sites for module in found for inner in module.modules() if inner is not module):
        raise ValueError(
            "`activation_checkpointing` and `gradient_checkpointing` must be false for these layers of the "
            f"{type(model).__name__}, because they contain each other or are not modules of their own. Name other layers with "
            "`anchor_layers`."
        )
    return list(found.items())


def _without_gradients(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer below the first connection without gradients, unless something in it or below it is trained."""
    trained = any(parameter.requires_grad for parameter in module.parameters())
    # Embeddings of which transformers asks gradients are leaves.
    if trained or any(isinstance(value, Tensor) and value.grad_fn is not None for value in (*args, *kwargs.values())):
        return checkpointed(module, forward, *args, **kwargs)
    with torch.no_grad():
        return forward(*args, **kwargs)
