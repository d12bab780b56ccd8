"""The tokenizer that an exported model gets: the one that it was trained with."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_align.data.tokenizer import Tokenizer, describe_tokenizer, load_tokenizer, tokenizer_differences
from lightning_align.data.tokenizer.record import PARTS_KEY

NONE = "none"
"""The value of `tokenizer` that writes no tokenizer."""


def tokenizer_of(
    checkpoint: str, record: Mapping[str, str] | None, *, given: str | None = None, force: bool = False
) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint.

    Args:
        checkpoint: The path of the checkpoint.
        record: What the checkpoint keeps of its tokenizer, if anything.
        given: The tokenizer to use. It is compared with the record. ``none`` uses no tokenizer.
        force: Use a given tokenizer that differs from the record.

    Returns:
        The tokenizer, or None if there is none.

    Raises:
        ValueError: If the given tokenizer differs, or there is none given and the recorded one is not found.
    """
    if given == NONE:
        return None
    if given is not None:
        tokenizer = load_tokenizer(given)
        if record is not None and (differences := tokenizer_differences(record, describe_tokenizer(tokenizer, given))):
            fault = (
                f"the tokenizer that {checkpoint} was trained with, {record['name']}, but {given} is another one: "
                f"{'; '.join(differences)}"
            )
            if not force:
                raise ValueError(
                    f"`tokenizer` must be {fault}. Leave --tokenizer out to write the tokenizer of the run, or write this one"
                    " with --force_tokenizer true."
                )
            warnings.warn(f"the exported tokenizer is not {fault}", stacklevel=2)
        return tokenizer
    if record is None:
        return None
    faults: list[str] = []
    for name in _places(checkpoint, record):
        try:
            tokenizer = load_tokenizer(name)
        except ValueError as error:
            faults.append(str(error))
            continue
        differences = tokenizer_differences(record, describe_tokenizer(tokenizer, name))
        if not differences:
            return tokenizer
        faults.append(f"{name} has changed since then: {'; '.join(differences)}")
    raise ValueError(
        f"the tokenizer that {checkpoint} was trained with, {record['name']}, is not found ({faults[0]}). Give its place with "
        f"--tokenizer, or export the model without a tokenizer with --tokenizer {NONE}."
    )


def folder_tokenizer(folder: str | Path) -> str | None:
    """Return the name of the tokenizer in an exported folder, or None if it has none."""
    return str(folder) if any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")) else None


def part_tokenizers(checkpoint: str, saved: Mapping[str, Any]) -> list[Tokenizer | None]:
    """Load the tokenizers of the augments of a composition.

    Args:
        checkpoint: The path of the checkpoint, or an exported folder.
        saved: The content of the checkpoint. Empty for a folder.

    Returns:
        The tokenizer of each augment, None for an augment without its own. Empty if no augment has one.
    """
    if saved:
        return [None if record is None else tokenizer_of(checkpoint, record) for record in saved.get(PARTS_KEY, ())]
    places = sorted(Path(checkpoint).glob("augment_*"), key=lambda place: int(place.name.rpartition("_")[2]))
    names = [folder_tokenizer(place) for place in places]
    return [None if name is None else load_tokenizer(name) for name in names]


def _places(checkpoint: str, record: Mapping[str, Any]) -> list[str]:
    """List where the tokenizer may be: under its name, where the run found it, and in what the run exported."""
    export = Path(checkpoint).resolve().parent.parent / "export"
    places = [record["name"], *([record["path"]] if "path" in record else [])]
    return [*places, *([str(export)] if (export / "tokenizer.json").is_file() else [])]
