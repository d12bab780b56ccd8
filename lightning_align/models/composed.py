"""Models that consist of frozen models and trained connections, such as `CALM`.

The frozen models have files of their own. So files and checkpoints of a composed model hold the weights of its connections, and
the hashes of its frozen models. Other rooms know such a model by its attributes, never by its type:

- ``frozen_parts``: the names of the submodules that contain the frozen models.
- ``identity`` and ``frozen_record()``: the exact hashes of the frozen models, and all their hashes as a checkpoint holds them.
- ``check_frozen_record(record, path)``: the comparison with the hashes of a checkpoint.
- ``trained_part``: the submodule that trains.
- ``twin()``: a copy of the model that shares the frozen models.
- ``proving()``: a context in which the model computes logits from tokens alone, for the proof of an export.
- ``check_exportable(frozen=)``, ``write_folder(...)`` and the class method ``read_folder(folder)``: its folder.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_align.models.deferred import recipes_kept

FrozenParts = Literal["whole", "references"]
"""How a folder holds frozen models: as folders inside of it, or as paths and names with the hashes of their weights."""
FROZEN, COMPOSITION = "frozen", "composition"
"""Where a checkpoint holds the hashes of the frozen models, and the description of the composed model."""
ROUNDED = "frozen_rounded"
"""Where a checkpoint holds the hashes that do not depend on the dtype."""


def is_composed(model: nn.Module) -> bool:
    """Return whether a model consists of frozen models and trained connections."""
    return bool(getattr(model, "frozen_parts", ()))


def without_frozen(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of a model without the weights of its frozen models. LoRA adapters in them stay.

    Args:
        model: Any model. A state dict of a model that is not composed is returned unchanged.
        state: The state dict.
    """
    prefixes = tuple(f"{part}." for part in getattr(model, "frozen_parts", ()))
    return {name: value for name, value in state.items() if not name.startswith(prefixes) or ".lora." in name}


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that the files of a model hold: all of them, or those of the connections of a composed model."""
    return without_frozen(model, model.state_dict())


def trained_part(model: nn.Module) -> nn.Module:
    """Return the submodule that trains: the connections of a composed model, otherwise the model."""
    part: nn.Module = getattr(model, "trained_part", model)
    return part


def copy_policy(model: Any, *, share: bool) -> nn.Module:
    """Copy a model.

    Args:
        model: The model.
        share: Whether the copy of a composed model shares its frozen models. False if the copy will be sharded by itself.
    """
    with recipes_kept(model) as made:
        copied: nn.Module = model.twin() if share and is_composed(model) else copy.deepcopy(model)
        made.append(copied)
    return copied


def prepare_frozen(model: Any, *, sharded: bool) -> bool:
    """Hash the frozen models of a composed model, before it is sharded.

    Args:
        model: Any model.
        sharded: Whether it will be sharded. Otherwise the hashes that do not depend on the dtype wait until they are needed.

    Returns:
        Whether the model is composed.
    """
    if not is_composed(model):
        return False
    _ = model.frozen_record() if sharded else model.identity
    return True


def record_frozen(model: Any) -> dict[str, Any]:
    """Return the hashes of the frozen models as a checkpoint holds them. Empty for other models."""
    record: dict[str, Any] = model.frozen_record() if is_composed(model) else {}
    return record


def check_record(model: Any, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Check that a composed model has the frozen models that a checkpoint was written with.

    Args:
        model: Any model. Others than composed ones are not checked.
        checkpoint: The checkpoint. One without hashes contains the frozen weights themselves.
        path: The path of the checkpoint, for the message.

    Raises:
        ValueError: If a frozen model has other weights. The message names it.
    """
    if is_composed(model) and FROZEN in checkpoint:
        model.check_frozen_record(checkpoint, path)


def proving(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a model computes logits from tokens alone, as the proof of an export needs it."""
    context: AbstractContextManager[Any] = getattr(model, "proving", nullcontext)()
    return context


def check_exportable(model: nn.Module, frozen: FrozenParts) -> None:
    """Check that a composed model can be written to a folder. Other models are not checked.

    Args:
        model: Any model.
        frozen: How the folder would hold the frozen models.

    Raises:
        ValueError: If a frozen model cannot be written or referred to.
    """
    check: Any = getattr(model, "check_exportable", None)
    if check is not None:
        check(frozen)
