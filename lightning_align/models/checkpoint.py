"""Reading checkpoints and building policies from them, and gathering a sharded checkpoint into one file."""

import argparse
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_align.models.building import Backbone, build_backbone, has_own_weights
from lightning_align.models.composed import COMPOSITION, FROZEN, check_record
from lightning_align.models.formats import read_model
from lightning_align.models.integrity import SHARDS_META, check_checkpoint, check_values, check_zip, reason_of
from lightning_align.models.lora import LoRAConfig, add_lora, merge_lora, remove_lora
from lightning_align.models.weights import load_weights, policy_state
from lightning_align.runtime.checksums import check_once
from lightning_align.runtime.files import publish


def gather_command(folder: str | Path) -> str | None:
    """Return the command that gathers a sharded checkpoint into one file, or None if the folder is not such a checkpoint."""
    if not (Path(folder) / SHARDS_META).is_file():
        return None
    name = Path(folder).name.removesuffix(".ckpt")
    return f"python -m lightning_align.models.checkpoint {folder} {name}-whole.ckpt"


def gather_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Read a sharded checkpoint in one process, in the form that a single process would have written.

    Args:
        folder: The folder that a sharded strategy wrote.

    Raises:
        ValueError: If the folder is not a sharded checkpoint, is damaged, or has code in it.
    """
    folder = Path(folder)
    if gather_command(folder) is None:
        raise ValueError(
            f"`folder` must be a sharded checkpoint, a folder with {SHARDS_META}, but got {folder}. Other checkpoints need no "
            "gathering."
        )
    check_checkpoint(folder)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "whole.pt"
        try:
            dcp_to_torch_save(folder, path)
            whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            rest: dict[str, Any] = torch.load(folder / SHARDS_META, map_location="cpu", weights_only=True)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise ValueError(
                f"checkpoint {folder} cannot be read ({reason_of(error)}). Use an earlier checkpoint of the run."
            ) from error
    # The optimizer states use parameter names as keys, in the optimizer's order. An optimizer accepts any keys.
    optimizers = sorted(name for name in whole if name.startswith("optimizer_"))
    return {**rest, "state_dict": whole["state_dict"], "optimizer_states": [whole[name] for name in optimizers]}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint, a state dict or a safetensors file. Only tensors and primitive types are unpickled.

    Returns:
        The checkpoint, a dictionary with at least `state_dict`.

    Raises:
        ValueError: If the file does not exist or cannot be read.
    """
    path = Path(path)
    if command := gather_command(path):
        raise ValueError(
            f"checkpoint {path} must be a file, but is a sharded checkpoint. Gather it into a file with: {command}"
        )
    if path.is_dir():
        inside = sorted(str(p) for p in path.rglob("*.ckpt"))[:5]
        hint = f", such as {', '.join(inside)}" if inside else ""
        raise ValueError(f"checkpoint {path} is a folder. Pass a file{hint}.")
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f" Its folder contains {', '.join(near)}." if near else ""
        raise ValueError(f"checkpoint {path}: there is no such file (the working directory is {Path.cwd()}).{hint}")
    try:
        if path.suffix == ".safetensors":
            return {"state_dict": load_file(path)}
        # Files in the format before torch 1.6 are no zip files and cannot be memory-mapped.
        if is_zip := zipfile.is_zipfile(path):
            check_once(path, partial(check_zip, path), kind="checkpoint")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch and safetensors raise many types here
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason_of(error)}). Pass a complete .ckpt file of a run, or a state dict "
            "(.pt, .safetensors)."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"checkpoint {path} must contain a dictionary, but contains a {type(checkpoint).__name__}. Pass a .ckpt file of a "
            "run, or a state dict."
        )
    if "state_dict" not in checkpoint:
        return {"state_dict": checkpoint}
    check_values(checkpoint["state_dict"], path)
    return checkpoint


def load_policy(path: str | Path, backbone: nn.Module | Backbone | dict[str, Any] | None = None) -> nn.Module:
    """Build a policy and load the weights of a checkpoint into it.

    A checkpoint that contains only LoRA adapters is merged into the base model that the adapters were trained on. The
    checkpoint names it (``init_from``), or else ``backbone`` must come with weights.

    Args:
        path: A checkpoint of this package (``.ckpt``), a bare state dict (``.ckpt``, ``.pt``, ``.safetensors``), or an exported
            folder.
        backbone: The model to build. Default is the model that the checkpoint describes.

    Raises:
        ValueError: If the file cannot be read, does not describe its model, or is of another model.
    """
    if (Path(path) / "config.json").is_file():
        return read_model(path)
    return build_policy(read_checkpoint(path), path, backbone)


def build_policy(
    checkpoint: dict[str, Any],
    path: str | Path,
    backbone: nn.Module | Backbone | dict[str, Any] | None = None,
    *,
    merge: bool = True,
) -> nn.Module:
    """Build the policy of a checkpoint that is already in memory.

    Args:
        checkpoint: The checkpoint, from `read_checkpoint` or `gather_checkpoint`.
        path: The path of the checkpoint, for error messages.
        backbone: The model to build. Default is the model that the checkpoint describes.
        merge: Whether to merge LoRA adapters into the weights. If false, they stay an active scope.

    Raises:
        ValueError: If the checkpoint does not describe its model, or is of another model.
    """
    hparams: dict[str, Any] = checkpoint.get("hyper_parameters", {})
    state = policy_state(checkpoint["state_dict"])
    if hparams.get("lora"):
        model = _base_of_adapters(path, hparams, backbone)
        config = LoRAConfig(**dict(hparams["lora"]))
        frozen = model.state_dict()
        add_lora(model, config)
        # Drop other scopes: a moving reference keeps its adapters in a scope next to the trained one.
        own = {n: v for n, v in state.items() if ".lora." not in n or f".lora.{config.scope}." in n}
        load_weights(model, {**frozen, **own}, path)
        if merge:
            merge_lora(model, config.scope)
            remove_lora(model, config.scope)
        return model
    given, backbone = backbone, backbone if backbone is not None else composition_spec(checkpoint) or hparams.get("backbone")
    if backbone is None and FROZEN in checkpoint:
        raise ValueError(f"checkpoint {path} does not say which models its connections connect. {_with_modules(path)}")
    if backbone is None:
        raise ValueError(f"checkpoint {path} does not describe its backbone. Pass it as `backbone`.")
    model = build_backbone(backbone)
    try:
        check_record(model, checkpoint, path)
    except ValueError as error:
        raise error if given is not None else ValueError(f"{error} {_with_modules(path)}") from error
    load_weights(model, state, path)
    return model


def composition_spec(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the description that builds the composition of a checkpoint, or None if there is none or it is of another model.

    Args:
        checkpoint: The checkpoint, from `read_checkpoint`.

    Raises:
        ValueError: If the run was started with models that the checkpoint cannot describe.
    """
    if checkpoint.get(COMPOSITION) is not None:
        return dict(checkpoint[COMPOSITION])
    hparams: dict[str, Any] = checkpoint.get("hyper_parameters", {})
    names = ("anchor", "augments", "connection", "combine", "anchor_layers", "anchor_position")
    if not hparams.get("augments") or hparams.get("anchor") is None:
        return None
    return {"class_path": "CALM", "init_args": {name: hparams[name] for name in names if name in hparams}}


def _with_modules(path: str | Path) -> str:
    return (
        "If the run was started with modules, build them again in Python and pass them to "
        f"`load_from_checkpoint({str(path)!r}, ..., weights_only=True)` of the module's class: as `anchor` and `augments` for "
        "a CALMModule, otherwise as `backbone`. Then write everything with `save_composition(module.policy, folder)`, or only "
        "the connections with `module.policy.save_connections(file)`."
    )


def _base_of_adapters(
    path: str | Path, hparams: dict[str, Any], backbone: nn.Module | Backbone | dict[str, Any] | None
) -> nn.Module:
    """Load the model that the adapters of a checkpoint were trained on."""
    if (base := hparams.get("init_from")) is not None:
        return load_policy(base, backbone)
    described = backbone if backbone is not None else hparams.get("backbone")
    model = None if described is None else build_backbone(described)
    if model is None or not (isinstance(backbone, nn.Module) or has_own_weights(model)):
        raise ValueError(
            f"checkpoint {path} contains only adapters and does not name the weights that they were trained on. Pass a model "
            "with these weights as `backbone`."
        )
    return model


def main() -> None:
    """Gather a sharded checkpoint into one file, which every strategy can load."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    whole = gather_checkpoint(arguments.folder)
    publish(arguments.file, lambda path: torch.save(whole, path))


if __name__ == "__main__":
    main()
