"""The weights that an iteration began with, stored beside its generated sets.

A run that is resumed on another processor trains the last steps of an iteration again and rounds differently. At the boundary
it then uses the stored weights, because the responses on disk are theirs.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_align.models.composed import own_state
from lightning_align.models.weights import check_weights, frozen_parameters, state_hash
from lightning_align.runtime.files import publish

POLICY = "policy.safetensors"
"""The file of the policy, in the folder of the iteration."""
AVERAGE = "average.safetensors"
"""The file of the moving average of the policy, if it is the opponent."""
ROUNDING = 32 * 2**-23
"""Random initial weights of two processors differ by at most this share of the largest weight (measured: 13 * 2^-23)."""


class Origin(NamedTuple):
    """What a file of weights says about where it comes from."""

    weights: str
    """The hash of the weights that the iteration began with."""
    run: str
    """The id of the run that wrote it."""
    content: str
    """The hash of the weights in this file. Empty in files of earlier versions."""
    frozen: str
    """The hash of the weights of a frozen base model that the file leaves out. Empty if it has all weights."""


def base_names(model: nn.Module) -> set[str]:
    """Return the names of the weights of a base model that only adapters adapt: those that do not train, adapters aside."""
    return {name for name in frozen_parameters(model) if ".lora." not in f".{name}"}


def save_weights(path: Path, weights: Mapping[str, Tensor], *, digest: str, run: str, base: Collection[str] = ()) -> None:
    """Write weights, completely or not at all.

    Args:
        path: The file.
        weights: The weights, each in its own memory.
        digest: The hash of all weights that the iteration began with.
        run: The id of the run.
        base: The names of weights to leave out. The file has their hash.
    """
    kept = {name: value for name, value in weights.items() if name not in base}
    metadata = {"sha256": digest, "run": run, "content": content_hash(kept)}
    if len(kept) < len(weights):
        metadata["frozen"] = content_hash({name: value for name, value in weights.items() if name in base})
    publish(path, lambda temporary: save_file(kept, temporary, metadata=metadata))


def read_origin(path: Path) -> Origin:
    """Read where a file of weights comes from, without its weights.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return Origin(*(metadata.get(name, "") for name in ("sha256", "run", "content", "frozen")))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read weights.

    Raises:
        ValueError: If the file cannot be read, or if it was changed after it was written.
    """
    content = read_origin(path).content
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    if content and content != content_hash(weights):
        raise _damaged(path, "its SHA-256 differs from the stored one")
    return weights


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights into a model in place. The model may be sharded.

    Args:
        model: The model.
        weights: The weights, which must be exactly those of the model. Those of a frozen base model may be left out if the file
            leaves them out.
        path: The file that they come from.
    """
    state = own_state(model)
    base = base_names(model) if read_origin(path).frozen else set()
    check_weights(model, {**{name: state[name] for name in base if name in state}, **weights}, path)
    for name, value in weights.items():
        own = state[name]
        value = value.to(own.device)
        own.copy_(distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value)


def differ_by_rounding(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of weights are equal up to rounding.

    Random initial weights differ by that much between two processors.
    """
    if own.keys() != stored.keys():
        return False
    for name, mine in own.items():
        theirs = stored[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return False
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                return False
        elif mine.numel():
            a, b = mine.double(), theirs.double()
            # Weights in fewer bits may be rounded from both sides of a boundary between two of their values.
            step = torch.finfo(mine.dtype).eps * b.abs() if mine.dtype.itemsize < 4 else 0.0
            if not bool(((a - b).abs() <= ROUNDING * b.abs().max() + step).all()):
                return False
    return True


def relative_distance(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return |own - stored| / |stored - start|: how far two runs of an iteration are apart, relative to what it changed."""
    apart, moved = (
        sum(float((a[name].double() - b[name].double()).square().sum()) for name in a if a[name].is_floating_point())
        for a, b in ((own, stored), (stored, start))
    )
    return (apart / moved) ** 0.5 if moved else float("inf")


def content_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the hash of weights in any order."""
    return state_hash(dict(sorted(weights.items())))


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}). Remove {path.parent} and resume from the last checkpoint of the previous iteration. "
        "This begins the iteration again."
    )
