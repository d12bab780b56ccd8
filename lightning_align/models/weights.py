"""Comparing, loading and hashing state dicts."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_align.models.composed import is_composed, own_state, without_frozen
from lightning_align.models.deferred import defer_loading, recipe_of

POLICY_PREFIX = "policy."
"""The prefix of the policy's weights in the state dict of a module of this package."""


def policy_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the policy in the state dict of a module. A state dict without the prefix is returned unchanged."""
    part = {name.removeprefix(POLICY_PREFIX): value for name, value in state.items() if name.startswith(POLICY_PREFIX)}
    return part or state


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict into a model.

    Args:
        model: The model.
        state: The weights, which must be exactly those of the model.
        path: The source of the weights, for error messages.

    Raises:
        ValueError: If weights are missing, unexpected or of another shape. The message names some of them.
    """
    check_weights(model, state, path)
    left = {name: value for name, value in state.items() if not value.is_meta}  # others keep what will be read into them
    deferred = defer_loading(model, left)
    strict = not (is_composed(model) or deferred or len(left) < len(state))
    model.load_state_dict({name: value for name, value in left.items() if name not in deferred}, strict=strict)


def frozen_parameters(model: nn.Module) -> list[str]:
    """Return the names, in a model's state dict, of the parameters that do not train.

    A state dict has a shared parameter, such as that of tied embeddings, under each of its names.
    """
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]


def check_weights(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Check that a state dict has exactly the weights of a model, with the same shapes.

    Args:
        model: The model.
        state: The weights to check.
        path: The source of the weights, for error messages.

    Raises:
        ValueError: If weights are missing, unexpected or of another shape. The message names some of them.
    """
    own = own_state(model)
    state = without_frozen(model, state)  # files of a sharded run contain the frozen models of a composition
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    problems = shapes[:3]
    if missing:
        problems.append(f"{len(missing)} weights are not in the file, such as {missing[0]}")
    if extra:
        problems.append(f"{len(extra)} weights of the file are not in the model, such as {extra[0]}")
    if problems:
        raise ValueError(
            f"checkpoint {path} is of another model than {type(model).__name__}: {', and '.join(problems)}. Omit `backbone` to "
            "build the model that the checkpoint describes, or pass the model that the checkpoint was written with."
        )


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 hash of the names, dtypes, shapes and values of all weights except LoRA adapters.

    Models that differ only in their LoRA adapters have the same hash.
    """
    return state_hash({name: value for name, value in model.state_dict(keep_vars=True).items() if ".lora." not in name})


def state_hash(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 hash of the names, dtypes, shapes and values of a state dict, in its order."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if (recipe := recipe_of(value)) is not None:
            value = recipe.whole().to(value.dtype)
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
