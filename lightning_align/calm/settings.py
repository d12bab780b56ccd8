"""The settings that connections depend on: which layers they connect, and how. Their file records them.

Connections that are used in another way load without an error, because no setting changes the shapes of all weights.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.spec import Augment, Spot

TRAINING_ONLY = ("attn_dropout",)
"""Settings of connections that do not change what they compute after training."""
RECORDED = ("position", "alignment", "tokens")
"""The settings of an augment that are recorded as they are."""
UNKNOWN = "unknown to this version"


def settings_record(
    specs: Sequence[Augment],
    spots: Sequence[Spot],
    config: ConnectionConfig,
    *,
    dim_head: int,
    combine: str,
    anchor_position: Any,
) -> dict[str, Any]:
    """Build the record of the settings, of JSON types.

    Args:
        specs: The augments and how they are connected.
        spots: The layers that each connection connects.
        config: The architecture of the connections.
        dim_head: The width of a head.
        combine: How several connections that end at the same layer are combined.
        anchor_position: The position of the composition, for augments that have none of their own.
    """
    architecture = {name: value for name, value in dataclasses.asdict(config).items() if name not in TRAINING_ONLY}
    ends = [spot.anchor_layer for spot in spots]
    record: dict[str, Any] = {"connection": {**architecture, "dim_head": dim_head}, "augments": []}
    if len(set(ends)) < len(ends):
        record["combine"] = combine  # otherwise it has no effect
    for index, spec in enumerate(specs):
        own = {name: _uniform(getattr(spec, name)) for name in RECORDED}
        own["tokens"] = "own" if spec.tokens == "own" else "shared"
        own["anchor_position"] = _uniform(getattr(spec, "anchor_position", None) or anchor_position)
        own["pairs"] = [[spot.augment_layer, spot.anchor_layer] for spot in spots if spot.augment == index]
        record["augments"].append(own)
    return record


def check_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str | Path) -> None:
    """Check that connections are used with the settings that they were trained with.

    Args:
        theirs: The record in the file.
        ours: The record of the composition.
        path: The path of the file, for the message.

    Raises:
        ValueError: If settings differ. The message names each, both values and the remedy.
    """
    found = [*_differences(theirs.get("connection", {}), ours["connection"], " of `connection`", ConnectionConfig())]
    pairs = zip(theirs.get("augments", []), ours["augments"], strict=True)
    for index, (their, our) in enumerate(pairs):
        found += _differences(their, our, f" of augment {index}", Augment(""))
    rest = ("connection", "augments")
    top = [{name: value for name, value in record.items() if name not in rest} for record in (theirs, ours)]
    found += _differences(top[0], top[1], "", None)
    if found:
        faults = "; ".join(f"{name} must be {their}, but is {our}" for name, their, our in found)
        raise ValueError(
            f"{path}: the connections must be used with the settings that they were trained with: {faults}. Compose the models "
            "with the settings of the file, or pass connections that were trained with yours."
        )


def _differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str, defaults: Any
) -> list[tuple[str, object, object]]:
    """List (name, their value, our value). A setting that the file does not have yet has its default there."""
    found: list[tuple[str, object, object]] = []
    for name in {**theirs, **ours}:
        their = theirs[name] if name in theirs else getattr(defaults, name, None)
        our = ours.get(name, None if theirs.get(name) in (None, False) else UNKNOWN)
        if (their or None) != (our or None):
            found.append((f"`{name}`{where}", their, our))
    return found


def _uniform(value: Any) -> Any:
    """Return a list whose entries are all equal as one of them, because it means the same."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    return value[0] if len(set(value)) == 1 else list(value)
