"""The safetensors file of a composition's connections.

Its metadata holds the weight hash of each frozen model and, as JSON under ``spots``, the layers that are connected.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_align.calm.probe import check_frozen
from lightning_align.calm.spec import Spot
from lightning_align.models.weights import load_weights
from lightning_align.runtime.files import publish


def write_connections(
    path: str | Path, state: Mapping[str, Tensor], spots: Sequence[Spot], identity: Mapping[str, str]
) -> None:
    """Write connections to a file.

    Args:
        path: The path of the file. It is written completely or not at all.
        state: The weights by name, each with the prefix ``connections.``.
        spots: The layers that each connection connects.
        identity: The weight hash of each frozen model.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {**identity, "spots": json.dumps(spots)}
    publish(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_connections(path: str | Path, connections: nn.Module, spots: Sequence[Spot], identity: Mapping[str, str]) -> None:
    """Load a file that `write_connections` wrote.

    Args:
        path: The path of the file.
        connections: The connections, loaded in place.
        spots: The layers that each connection connects.
        identity: The weight hash of each frozen model.

    Raises:
        ValueError: If the file cannot be read, connects other layers, or was trained with other models.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name.removeprefix("connections."): file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors raises its own exception types
        raise ValueError(f"{path}: cannot be read: {error}. Pass a file that `CALM.save_connections` wrote.") from error
    expected = [list(spot) for spot in spots]
    if json.loads(metadata.get("spots", "null")) != expected:
        raise ValueError(
            f"{path}: the connections must connect {expected} (augment, augment layer, anchor layer), but those in the file "
            f"connect {metadata.get('spots')}. Pass a file of a composition with the same connections."
        )
    check_frozen(identity, metadata, path)
    load_weights(connections, state, path)
