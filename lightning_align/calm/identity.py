"""The identity of frozen models: hashes of their weights, exact and rounded.

A model in float32 and its copy in bfloat16 have the same weights up to rounding. So their weights are also hashed after
rounding to 16 bits, where both have the same bytes. Both formats of 16 bits are used, because a copy may have either. Models of
the same dtype are compared exactly.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_align.models.weights import weights_hash

ROUNDINGS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""The formats that weights are rounded to, by name."""
DTYPE = "dtype"
Fingerprints = dict[str, dict[str, str]]
"""The hash of each frozen model's rounded weights, by model and format."""


def frozen_models(anchor: nn.Module, augments: nn.ModuleList) -> dict[str, nn.Module]:
    """Return the frozen models by name: ``anchor``, ``augments.0`` and so on."""
    return {"anchor": anchor} | {f"augments.{index}": model for index, model in enumerate(augments)}


def exact_hashes(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the SHA-256 of the weights of each model, which depends on their dtype."""
    return {name: weights_hash(model) for name, model in models.items()}


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return the dtypes of the weights, and the SHA-256 of their names, shapes and rounded values for each rounding.

    LoRA adapters are left out.
    """
    dtypes = {str(value.dtype).removeprefix("torch.") for value in model.state_dict().values() if value.is_floating_point()}
    digests = {name: hashlib.sha256() for name in ROUNDINGS}
    for name, value in model.state_dict().items():
        if ".lora." in name:
            continue
        for rounding, digest in digests.items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            rounded = value.detach().to(ROUNDINGS[rounding]) if value.is_floating_point() else value
            digest.update(rounded.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {DTYPE: " ".join(sorted(dtypes)), **{name: digest.hexdigest() for name, digest in digests.items()}}


def fingerprints(models: Mapping[str, nn.Module]) -> Fingerprints:
    """Return the `fingerprint` of each model."""
    return {name: fingerprint(model) for name, model in models.items()}


def check_frozen(
    here: Mapping[str, str],
    there: Mapping[str, Any],
    path: str | Path,
    *,
    rounded_here: Callable[[], Fingerprints] | None = None,
    rounded_there: Mapping[str, Mapping[str, str]] | None = None,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Check that the frozen models have the weights that connections were trained with, up to their dtype.

    Args:
        here: The exact hash of each model, by name.
        there: The exact hashes in the file.
        path: The path of the file, for the message.
        rounded_here: Computes the fingerprint of each model.
        rounded_there: The fingerprints in the file. Without them, only the exact hashes count.
        sources: The files that models were loaded from, for the message.

    Raises:
        ValueError: If a model has other weights. The message names it.
    """
    others = [name for name, value in here.items() if there.get(name) != value]
    if others and rounded_here is not None and rounded_there:
        own = rounded_here()
        others = [name for name in others if not _same_rounded(own[name], rounded_there.get(name, {}))]
    if others:
        known = sources or {}
        named = [f"{name} ({known[name]})" if name in known else name for name in others]
        raise ValueError(
            f"{path}: the connections were trained with other weights of {' and '.join(named)}. "
            "Pass the models, with the weights, that they were trained with. They are not in the file, which has their hashes."
        )


def _same_rounded(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether one model is the other in another dtype: they are equal in the dtype that has fewer bits."""
    dtypes = {one.get(DTYPE), other.get(DTYPE)}
    if len(dtypes) == 1 or None in dtypes:
        return False
    narrow = [name for name in ROUNDINGS if any(name in str(dtype).split() for dtype in dtypes)] or list(ROUNDINGS)
    return all(one[name] == other.get(name) for name in narrow)
