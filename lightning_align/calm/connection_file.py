"""The safetensors file of a composition's connections.

Its metadata holds the weight hash of each frozen model and, as JSON, the layers that are connected (``spots``), the settings of
the connections (``settings``), the hashes of the rounded weights (``fingerprints``), and a hash of all this and of the weights
(``content``). Files of release 0.1.0 have only the first two.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_align.calm.identity import Fingerprints, check_frozen
from lightning_align.calm.settings import check_settings
from lightning_align.calm.spec import Spot
from lightning_align.models.weights import load_weights, state_hash
from lightning_align.runtime.files import publish

CONTENT = "content"
"""The entry of the metadata that holds the hash of the others and of the weights."""


def write_connections(
    path: str | Path,
    state: Mapping[str, Tensor],
    spots: Sequence[Spot],
    identity: Mapping[str, str],
    settings: Mapping[str, Any],
    rounded: Fingerprints,
) -> None:
    """Write connections to a file, read it back, and compare.

    Args:
        path: The path of the file. It is written completely or not at all.
        state: The weights by name, each with the prefix ``connections.``.
        spots: The layers that each connection connects.
        identity: The weight hash of each frozen model.
        settings: The settings of the connections, from `settings_record`.
        rounded: The hashes of the rounded weights of each frozen model.

    Raises:
        ValueError: If a weight is not finite, the file cannot be written, or what was written is not what was given.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    wrong = next((name for name, value in tensors.items() if not bool(value.isfinite().all())), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: the connections must be finite, but {wrong} contains NaN or infinity. Nothing was written. Load an "
            "earlier checkpoint."
        )
    documents = {"spots": spots, "settings": settings, "fingerprints": rounded}
    metadata = {**identity, **{name: json.dumps(document) for name, document in documents.items()}}
    metadata[CONTENT] = _content(metadata, tensors)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=metadata)
        found, read = _read(temporary)
        same = found == metadata and read.keys() == tensors.keys()
        if not same or not all(torch.equal(_bytes(read[name]), _bytes(value)) for name, value in tensors.items()):
            raise ValueError(f"{path}: what was written is not what was read back. Nothing was written. Check the disk.")

    publish(path, write)


def read_connections(
    path: str | Path,
    connections: nn.Module,
    spots: Sequence[Spot],
    identity: Mapping[str, str],
    settings: Mapping[str, Any],
    rounded: Callable[[], Fingerprints],
    sources: Mapping[str, str],
) -> None:
    """Load a file that `write_connections` wrote.

    Args:
        path: The path of the file.
        connections: The connections, loaded in place.
        spots: The layers that each connection connects.
        identity: The weight hash of each frozen model.
        settings: The settings of the connections, from `settings_record`.
        rounded: Computes the hashes of the rounded weights of each frozen model.
        sources: The files that frozen models were loaded from, for messages.

    Raises:
        ValueError: If the file cannot be read, connects other layers, has other settings, or was trained with other models.
    """
    try:
        metadata, tensors = _read(path)
        if metadata.get(CONTENT, _content(metadata, tensors)) != _content(metadata, tensors):
            raise ValueError("it was changed after it was written: its hash differs")
    except Exception as error:  # safetensors raises its own exception types
        raise ValueError(f"{path}: cannot be read: {error}. Pass a file that `CALM.save_connections` wrote.") from error
    state = {name.removeprefix("connections."): value for name, value in tensors.items()}
    expected = [list(spot) for spot in spots]
    if json.loads(metadata.get("spots", "null")) != expected:
        raise ValueError(
            f"{path}: the connections must connect {expected} (augment, augment layer, anchor layer), but those in the file "
            f"connect {metadata.get('spots')}. Pass a file of a composition with the same connections."
        )
    if "settings" in metadata:
        check_settings(json.loads(metadata["settings"]), settings, path)
    there = json.loads(metadata.get("fingerprints", "{}"))
    check_frozen(identity, metadata, path, rounded_here=rounded, rounded_there=there, sources=sources)
    load_weights(connections, state, path)


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}


def _content(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    rest = {name: value for name, value in metadata.items() if name != CONTENT}
    weights = state_hash(dict(sorted(tensors.items())))
    return hashlib.sha256(json.dumps([rest, weights], sort_keys=True).encode()).hexdigest()


def _bytes(value: Tensor) -> Tensor:
    return value.flatten().view(torch.uint8)
