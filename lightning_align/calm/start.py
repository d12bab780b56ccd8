"""A composition to start from: a folder, or a checkpoint of a run."""

from pathlib import Path
from typing import Any

from torch import nn

from lightning_align.calm.folder import read_manifest
from lightning_align.calm.spec import Augment
from lightning_align.models.checkpoint import composition_spec, load_policy, read_checkpoint
from lightning_align.models.composed import is_composed


def composition_of(path: str) -> nn.Module:
    """Read a composition.

    Args:
        path: The folder of a composition, or the checkpoint of a run that trained one.

    Raises:
        ValueError: If the path contains another model.
    """
    model = load_policy(path)
    if not is_composed(model):
        raise ValueError(
            f"`init_from` must be the folder or the checkpoint of a composition, but {path} contains a {type(model).__name__}. "
            "Give it as `anchor`, with the `augments` to compose it with."
        )
    return model


def augments_of(path: str) -> list[Augment]:
    """Return how the augments of a composition are connected, without their models.

    Args:
        path: As for `composition_of`.

    Raises:
        ValueError: If the path contains another model.
    """
    found: Any
    if (Path(path) / "config.json").is_file():
        found = [entry["arguments"] for entry in read_manifest(path)["augments"]]
    else:
        spec = composition_spec(read_checkpoint(path))
        if spec is None:
            raise ValueError(f"`init_from` must be the folder or the checkpoint of a composition, but {path} is not.")
        found = spec["init_args"]["augments"]
    return [Augment(**{**arguments, "model": ""}) for arguments in found]
