"""Models of transformers whose weights each rank reads from safetensors by itself, only the parts that its shards need."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_align.models.deferred import CannotDefer, Slices, recipe_of, without_draws
from lightning_align.runtime.checksums import read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class _Stored:
    """A weight in a safetensors file."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __call__(self, where: Slices) -> Tensor:
        # Opened each time, so that no pages of the file stay mapped.
        with safe_open(self.file, framework="pt") as opened:
            part: Tensor = opened.get_slice(self.name)[where]
        return part


def build_deferred_pretrained(kind: Any, config: Any, name: str, options: dict[str, Any]) -> Any:
    """Build a model of a folder or of the hub without reading its weights.

    Args:
        kind: The class of transformers that builds it.
        config: Its configuration.
        name: The folder or the name on the hub.
        options: ``dtype``, ``attn_implementation``, ``revision``, ``trust_remote_code`` and ``local_files_only``.

    Returns:
        The model. Its large weights have recipes that read the files; see `lightning_align.models.deferred`.

    Raises:
        CannotDefer: If the files do not hold each weight under its name, as those of older layouts.
    """
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    source = {key: options[key] for key in ("revision", "local_files_only")}
    whole = cached_file(name, WEIGHTS, **source, _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        with safe_open(whole, framework="pt") as opened:
            files = {key: Path(whole) for key in opened.keys()}  # no dictionary
    elif (index := cached_file(name, INDEX, **source, _raise_exceptions_for_missing_entries=False)) is not None:
        placed = _placed(Path(index))
        found = {part: Path(cached_file(name, part, **source)) for part in sorted(set(placed.values()))}
        files = {key: found[part] for key, part in placed.items()}
    else:
        raise CannotDefer(f"{name} has no {WEIGHTS}")
    if getattr(config, "quantization_config", None) is not None:
        raise CannotDefer("its weights are quantized")
    dtype = _dtype(config, files, options["dtype"])
    with without_draws():
        model = kind.from_config(config, dtype=dtype, attn_implementation=options["attn_implementation"])
    kept = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    if kept and dtype is not torch.float32:
        raise CannotDefer("some of its layers stay in float32")
    _connect(model, files)
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, **source)
    except OSError:
        pass  # it has none, and the model has made one of its configuration
    model.config.name_or_path = name
    return model.eval()


def _dtype(config: Any, files: dict[str, Path], wanted: str) -> torch.dtype:
    if wanted != "auto":
        given: torch.dtype = getattr(torch, wanted)
        return given
    declared = getattr(config, "dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    name, file = next(iter(files.items()))
    return _Stored(file, name)((slice(0, 1),)).dtype


@torch.no_grad()
def _connect(model: Any, files: dict[str, Path]) -> None:
    """Make each weight come from its file. Small weights are read at once."""
    weights = dict(model.state_dict(keep_vars=True))
    prefix = f"{model.base_model_prefix}."
    names = {name: name if name in weights else prefix + name for name in files}
    unknown = sorted(own for own in names.values() if own not in weights)
    if unknown:
        raise CannotDefer(f"{len(unknown)} weights of its files have other names, such as {unknown[0]}")
    read = set()
    for name, own in names.items():
        weight, stored = weights[own], _Stored(files[name], name)
        with safe_open(files[name], framework="pt") as opened:
            shape = tuple(opened.get_slice(name).get_shape())
        if shape != tuple(weight.shape):
            raise CannotDefer(f"{own} is {shape} in the file and {tuple(weight.shape)} in the model")
        recipe = recipe_of(weight)
        if recipe is not None:
            recipe.start_from(stored)
        else:
            weight.copy_(stored(tuple(slice(0, size) for size in shape)) if shape else _scalar(files[name], name))
        read.add(id(weight))
    missing = [name for name, weight in weights.items() if id(weight) not in read]  # tied weights are read under one name
    if missing:
        raise CannotDefer(f"{len(missing)} weights are not in its files, such as {missing[0]}")


def _placed(index: Path) -> dict[str, str]:
    """Return the file of each weight. None of them is outside of the folder."""
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) and Path(name).name == name for name in placed.values()):
        raise ValueError(f"{index} must name a file of its folder for each weight in `weight_map`, but does not.")
    return placed


def _scalar(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        value: Tensor = opened.get_tensor(name)
    return value


def pretrained_parts(model: nn.Module) -> list[Any]:
    """Return the models of transformers in a model whose output layer was not looked at, because they had no weights."""
    return [part for part in model.modules() if getattr(part, "awaits_probe", False)]
