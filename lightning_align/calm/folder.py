"""The folder of a composition.

    config.json               what builds the composition, and the hashes of its models and its connections
    connections.safetensors   the connections, as `CALM.save_connections` writes them
    anchor/ augment_0/ ...    the frozen models, as `write_model` writes them, if they are in the folder
    tokenizer.json ...        the tokenizer of the anchor. An augment's own tokenizer is in its folder.

A frozen model is in the folder (``whole``), or the folder names the file or the hub name that it came from (``references``).
Both have hashes that do not depend on the dtype, and reading compares them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_align.calm.alignment import Alignment
from lightning_align.calm.connection_file import write_connections
from lightning_align.calm.identity import fingerprint, frozen_models
from lightning_align.calm.parts import build_part, described_arguments, described_augment, reference_of
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.models.building import backbone_spec
from lightning_align.models.composed import FrozenParts, without_frozen
from lightning_align.models.folders import CARD, CONNECTIONS, replaced_folder, write_tokenizer
from lightning_align.models.formats import CONFIG, WEIGHTS, merged_weights, read_model, whole_weights, write_model
from lightning_align.models.language_model import vocabulary_size
from lightning_align.models.lora import lora_layers
from lightning_align.models.peft_adapters import has_peft
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.proof import Expected, prove
from lightning_align.models.weights import weights_hash
from lightning_align.runtime.checksums import check_sums, read_object
from lightning_align.runtime.files import publish, publish_text
from lightning_align.runtime.ranks import is_sharded

VERSION = 1
"""The version of the folder's format."""
CLASS = "lightning_align.calm.model.CALM"
"""The class that reads the folder."""
KEY = "composition"
"""The entry of config.json that other models do not have."""


def folder_names(count: int) -> list[str]:
    """Return the names of the folders of the anchor and of a number of augments."""
    return ["anchor", *(f"augment_{index}" for index in range(count))]


def check_exportable(model: Any, frozen: FrozenParts) -> None:
    """Check that a composition can be written to a folder.

    Args:
        model: The composition.
        frozen: How the folder holds the frozen models.

    Raises:
        ValueError: If a frozen model cannot be written or referred to in this way. The message names it.
    """
    if frozen not in get_args(FrozenParts):
        raise ValueError(f"`frozen` must be one of {', '.join(get_args(FrozenParts))}, but got {frozen!r}.")
    for name, part in frozen_models(model.anchor, model.augments).items():
        if any(True for _ in lora_layers(part)):
            raise ValueError(
                f"{name} has LoRA adapters, which the folder of a composition cannot hold. Merge them with `merge_lora` and "
                "`remove_lora`, or save the checkpoint."
            )
        if frozen == "references" and reference_of(part) is None:
            raise ValueError(
                f"{name} is a {type(part).__name__} that was not loaded from a file, so a folder cannot refer to it. Write it "
                "too (`frozen` must be 'whole'), or build the composition with the path of the model."
            )
        if frozen == "whole" and backbone_spec(part) is None:
            raise ValueError(
                f"{name} is a {type(part).__name__} without `init_args`, from which it could be rebuilt. Write only the "
                "connections with `CALM.save_connections`, wrap a model of transformers in PretrainedLM, or give the class a "
                "dictionary `init_args`."
            )
    if frozen == "whole" and is_sharded(model):
        raise ValueError(
            "A sharded composition cannot be written with its frozen models. Gather its checkpoint and export it with "
            "`lightning-align export`, or write references (`frozen` must be 'references')."
        )


def write_composition(
    model: Any,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    *,
    frozen: FrozenParts,
    expected: Expected,
    tokenizer: Any = None,
    part_tokenizers: Sequence[Any] = (),
    eos_ids: Sequence[int] = (),
    card: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a composition, and check that what is read back computes what the composition computes.

    Args:
        model: The composition.
        weights: The weights of its connections, from `whole_weights`.
        folder: The folder. It is written under a temporary name first.
        frozen: How the folder holds the frozen models.
        expected: What the composition computes, from `expected_logits`.
        tokenizer: The tokenizer of the anchor.
        part_tokenizers: The tokenizer of each augment. None for an augment without its own.
        eos_ids: The ids that end a response, for the anchor's generation settings.
        card: The text of the model card.
        max_shard_size: The maximum size of a weights file.

    Raises:
        ValueError: If something cannot be written, or the composition that is read back computes something else. The folder
            then keeps the earlier export.
    """
    check_exportable(model, frozen)
    models = frozen_models(model.anchor, model.augments)
    arguments = [described_augment(spec, model.spots, index) for index, spec in enumerate(model.specs)]
    identity, rounded = dict(model.identity), dict(model.fingerprints)
    with replaced_folder(folder, CONFIG) as partial:
        entries: list[dict[str, Any]] = []
        tokenizers = [None, *part_tokenizers, *[None] * len(models)]
        for (name, part), place, own in zip(models.items(), folder_names(len(model.augments)), tokenizers, strict=False):
            if frozen == "references":
                source = reference_of(part)
                entry = {"source": source, **_absolute(source)}
                if "path" in entry and Path(entry["path"]).is_relative_to(Path(folder).resolve()):
                    raise ValueError(
                        f"`folder` must not contain the models that it refers to, but {entry['path']} is in {folder}, whose "
                        "content is replaced. Pass another folder, or write the models too (`frozen` must be 'whole')."
                    )
            else:
                entry = {"folder": place}
                _write_part(part, partial / place, eos_ids if name == "anchor" else (), max_shard_size)
                if isinstance(part, PretrainedLM) and has_peft(part.model):  # the writer has merged its adapters
                    read = read_model(partial / place)
                    identity[name], rounded[name] = weights_hash(read), fingerprint(read)
            write_tokenizer(own, _made(partial / place)) if own is not None else None
            entries.append({**entry, "sha256": identity[name], "rounded": rounded[name]})
        write_connections(partial / CONNECTIONS, without_frozen(model, weights), model.spots, identity, model.settings, rounded)
        content = {
            "model_type": "lightning_align",
            "class_path": CLASS,
            KEY: {
                "version": VERSION,
                "anchor": entries[0],
                "augments": [{**entry, "arguments": given} for entry, given in zip(entries[1:], arguments, strict=True)],
                "arguments": described_arguments(model.arguments, model.anchor),
                CONNECTIONS: _file_hash(partial / CONNECTIONS),
            },
        }
        publish_text(partial / CONFIG, json.dumps(content, indent=2) + "\n")
        prove(read_model(partial), expected, folder)
        write_tokenizer(tokenizer, partial)
        if card is not None:
            publish_text(partial / CARD, card)


def _write_part(part: nn.Module, folder: Path, eos_ids: Sequence[int], max_shard_size: str) -> None:
    """Write a frozen model. One that does not read tokens has no logits to compare: the hash of its weights is its proof."""
    weights = merged_weights(part, whole_weights(part))
    if vocabulary_size(part) is not None:
        write_model(part, weights, folder, eos_ids=eos_ids, max_shard_size=max_shard_size)
        return
    publish(folder / WEIGHTS, lambda path: save_file(weights, path))
    publish_text(folder / CONFIG, json.dumps(backbone_spec(part), indent=2) + "\n")


def _absolute(source: Any) -> dict[str, str]:
    name = source["init_args"]["name"] if isinstance(source, Mapping) else source
    return {"path": str(Path(name).resolve())} if Path(name).exists() else {}


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading


def read_composition(kind: Any, folder: str | Path) -> Any:
    """Read a composition that `write_composition` wrote. No code and no pickle comes from the folder.

    Args:
        kind: The class of the composition.
        folder: The folder.

    Returns:
        The composition, in evaluation mode.

    Raises:
        ValueError: If the folder is damaged, or a frozen model is missing or has other weights.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / CONNECTIONS
    if not path.is_file() or _file_hash(path) != manifest.get(CONNECTIONS):
        raise ValueError(f"{path} is missing or was changed after it was written. Write the composition again.")
    try:
        augments = manifest["augments"]
        places = folder_names(len(augments))
        entries = [manifest["anchor"], *augments]
        models = [_read_part(folder, place, entry) for place, entry in zip(places, entries, strict=True)]
        specs = [{**entry["arguments"], "model": model} for entry, model in zip(augments, models[1:], strict=True)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a composition ({error!r}). Write it again.") from error
    try:
        model = kind(models[0], specs, **manifest["arguments"])
    except TypeError as error:
        raise ValueError(f"{folder}: the composition has settings that this version does not know ({error}).") from error
    model.load_connections(path)
    model.alignment = _alignment(folder, model.readers)
    return model.eval()


def _alignment(folder: Path, readers: Sequence[Any]) -> Alignment | None:
    """Return the conversion of rows for augments with their own tokenizers, if the folder has all tokenizers that it needs."""
    places = zip(folder_names(len(readers))[1:], readers, strict=True)
    own = [folder / place if reader.own and not reader.prefix else None for place, reader in places]
    needed = [folder, *filter(None, own)]
    if len(needed) == 1 or not all((place / "tokenizer.json").is_file() for place in needed):
        return None
    return Alignment(load_tokenizer(str(folder)), [None if place is None else load_tokenizer(str(place)) for place in own])


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read what config.json says about a composition.

    Raises:
        ValueError: If the folder contains no composition, or one of a later version.
    """
    path = Path(folder) / CONFIG
    check_sums(folder)
    content = read_object(path) if path.is_file() else {}
    manifest: Any = content.get(KEY)
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder} must contain a composition, but does not. Pass a folder that `save_composition` wrote.")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder} has version {manifest.get('version')} of the format of compositions, but this package reads version "
            f"{VERSION}. Install the release that wrote it."
        )
    return manifest


def _read_part(folder: Path, place: str, entry: Mapping[str, Any]) -> nn.Module:
    if "folder" in entry:
        # Not the name in the file, which could lead out of the folder.
        return build_part(folder / place)
    source, path = entry["source"], entry.get("path")
    name = source["init_args"]["name"] if isinstance(source, Mapping) else source
    if path is not None and not Path(name).exists():
        name = path
        source = {**source, "init_args": {**source["init_args"], "name": path}} if isinstance(source, Mapping) else path
    try:
        return build_part(source)
    except ValueError as error:
        raise ValueError(f"{folder}: the model {name} of {place} cannot be loaded ({error})") from error


# -- the public functions


def save_composition(
    model: nn.Module,
    folder: str | Path,
    *,
    frozen: FrozenParts = "whole",
    tokenizer: Any = None,
    augment_tokenizers: Sequence[Any] = (),
    card: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a `CALM` to a folder, which `load_composition` reads. What is read back is compared with the composition.

    Args:
        model: The composition.
        folder: The folder. It must be empty or contain an earlier export, which is replaced.
        frozen: With `whole`, the folder contains the anchor and the augments. With `references`, it has the paths or hub names
            that they were loaded from, and the hashes of their weights.
        tokenizer: The tokenizer of the anchor, of this package or of transformers.
        augment_tokenizers: The tokenizer of each augment, in order. None for an augment without its own.
        card: The text of the model card.
        max_shard_size: The maximum size of a weights file, for a `PretrainedLM`.

    Raises:
        ValueError: If the folder contains other files, a model cannot be written or referred to, or what was written does not
            compute what the composition computes.
    """
    write_model(
        model,
        whole_weights(model),
        folder,
        tokenizer=tokenizer,
        part_tokenizers=augment_tokenizers,
        card=card,
        max_shard_size=max_shard_size,
        frozen=frozen,
    )


def load_composition(folder: str | Path) -> Any:
    """Read a `CALM` from a folder that `save_composition`, `ExportModel` or `lightning-align export` wrote.

    Args:
        folder: The folder.

    Returns:
        The composition, in evaluation mode. Only its connections train.

    Raises:
        ValueError: If the folder contains no composition, is damaged, or a frozen model is missing or has other weights.
    """
    read_manifest(folder)
    return read_model(folder)
