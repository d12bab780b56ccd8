"""State dicts of models: compared, loaded and hashed."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

POLICY_PREFIX = "policy."
"""Where the modules of this package keep the policy in their state."""


def policy_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The policy's part of a state dict; all of it if it has no such part."""
    part = {name.removeprefix(POLICY_PREFIX): value for name, value in state.items() if name.startswith(POLICY_PREFIX)}
    return part or state


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load all weights, or say how the checkpoint differs.

    Raises:
        ValueError: naming weights that are missing, left over or of another shape.
    """
    check_weights(model, state, path)
    model.load_state_dict(state)


def check_weights(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Say how a state dict differs from what a model has.

    Raises:
        ValueError: naming weights that are missing, left over or of another shape.
    """
    own = model.state_dict()
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
            f"checkpoint {path}: is of another model than {type(model).__name__}: {'; '.join(problems)}. Leave `backbone` out "
            "to build the one that the checkpoint describes, or give the one that it was made with"
        )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all weights, names and dtypes, but for LoRA adapters: two models of one base have one hash."""
    return state_hash({name: value for name, value in model.state_dict().items() if ".lora." not in name})


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 of a state dict: weights, names and dtypes."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
