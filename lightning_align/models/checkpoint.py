"""Weights of a policy out of a checkpoint: its architecture, its adapters, and a check that they fit."""

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_align.models.building import Backbone, build_backbone, has_own_weights
from lightning_align.models.formats import read_model
from lightning_align.models.lora import LoRAConfig, add_lora, merge_lora, remove_lora
from lightning_align.models.weights import load_weights, policy_state
from lightning_align.runtime.files import publish

SHARDS_META = "meta.pt"
"""What Lightning writes beside the shards of a checkpoint, and only there."""


def gather_command(folder: str | Path) -> str | None:
    """What makes one file of a sharded checkpoint, for messages; None where there is none."""
    if not (Path(folder) / SHARDS_META).is_file():
        return None
    name = Path(folder).name.removesuffix(".ckpt")
    return f"python -m lightning_align.models.checkpoint {folder} {name}-whole.ckpt"


def gather_checkpoint(folder: str | Path) -> dict[str, Any]:
    """A sharded checkpoint as the one that a single process would have written, read by one process.

    It is torch's format of shards, which unlike a file of `read_checkpoint` is unpickled: open only your own.

    Args:
        folder: that a sharded strategy wrote it into.

    Raises:
        ValueError: if it is no sharded checkpoint.
    """
    folder = Path(folder)
    if gather_command(folder) is None:
        raise ValueError(f"checkpoint {folder}: is no sharded checkpoint, a folder with {SHARDS_META}; it needs no gathering")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "whole.pt"
        dcp_to_torch_save(folder, path)
        whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    rest: dict[str, Any] = torch.load(folder / SHARDS_META, map_location="cpu", weights_only=True)
    # By the names of parameters, in the optimizer's order: an optimizer takes any names.
    optimizers = sorted(name for name in whole if name.startswith("optimizer_"))
    return {**rest, "state_dict": whole["state_dict"], "optimizer_states": [whole[name] for name in optimizers]}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint, or a safetensors file as one, without unpickling anything but tensors and primitives.

    Raises:
        ValueError: if there is no such file or it cannot be read.
    """
    path = Path(path)
    if command := gather_command(path):
        raise ValueError(f"checkpoint {path}: is a sharded one, a folder; make a file of it with: {command}")
    if path.is_dir():
        inside = sorted(str(p) for p in path.rglob("*.ckpt"))[:5]
        hint = f", such as {', '.join(inside)}" if inside else ""
        raise ValueError(f"checkpoint {path}: is a folder; give a file{hint}")
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f"; that folder has {', '.join(near)}" if near else ""
        raise ValueError(f"checkpoint {path}: there is no such file (looked from {Path.cwd()}){hint}")
    try:
        if path.suffix == ".safetensors":
            return {"state_dict": load_file(path)}
        # The format before torch 1.6 cannot be mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch and safetensors raise a dozen kinds here
        # What they say is long, and of how to switch their checks off.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0].partition('. ')[0] if str(error) else 'empty'}"
        raise ValueError(
            f"checkpoint {path}: cannot be read ({reason}); give a .ckpt that a run wrote to its end, or a state dict "
            "(.pt, .safetensors)"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"checkpoint {path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint if "state_dict" in checkpoint else {"state_dict": checkpoint}


def load_policy(path: str | Path, backbone: nn.Module | Backbone | dict[str, Any] | None = None) -> nn.Module:
    """Build a policy and give it the weights of a checkpoint.

    Args:
        path: written by a module of this package (``.ckpt``), a bare state dict (``.ckpt``, ``.pt``, ``.safetensors``), or
            a folder that was exported. One that holds only LoRA adapters leads on to the checkpoint they were trained on, into
            which they are merged.
        backbone: what to build; by default what the checkpoint says.

    Raises:
        ValueError: if the file cannot be read, does not say what to build, or is of another model.
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
    """The policy of a checkpoint that was read.

    Args:
        checkpoint: from `read_checkpoint` or `gather_checkpoint`.
        path: where it came from, for messages.
        backbone: what to build; by default what the checkpoint says.
        merge: whether adapters are merged into the weights; otherwise they are a scope in use.

    Raises:
        ValueError: as `load_policy`.
    """
    hparams: dict[str, Any] = checkpoint.get("hyper_parameters", {})
    state = policy_state(checkpoint["state_dict"])
    if hparams.get("lora"):
        model = _base_of_adapters(path, hparams, backbone)
        config = LoRAConfig(**dict(hparams["lora"]))
        frozen = model.state_dict()
        add_lora(model, config)
        # A moving reference is a scope beside the one that trained.
        own = {n: v for n, v in state.items() if ".lora." not in n or f".lora.{config.scope}." in n}
        load_weights(model, {**frozen, **own}, path)
        if merge:
            merge_lora(model, config.scope)
            remove_lora(model, config.scope)
        return model
    backbone = backbone if backbone is not None else hparams.get("backbone")
    if backbone is None:
        raise ValueError(f"checkpoint {path}: does not say which backbone it is of; give `backbone`")
    model = build_backbone(backbone)
    load_weights(model, state, path)
    return model


def _base_of_adapters(
    path: str | Path, hparams: dict[str, Any], backbone: nn.Module | Backbone | dict[str, Any] | None
) -> nn.Module:
    """The model that a checkpoint of adapters was trained on."""
    if (base := hparams.get("init_from")) is not None:
        return load_policy(base, backbone)
    described = backbone if backbone is not None else hparams.get("backbone")
    model = None if described is None else build_backbone(described)
    if model is None or not (isinstance(backbone, nn.Module) or has_own_weights(model)):
        raise ValueError(
            f"checkpoint {path}: holds adapters only and does not say on which weights they were trained: give those as "
            "`backbone`"
        )
    return model


def main() -> None:
    """Gather a sharded checkpoint into one file, which any strategy opens."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    whole = gather_checkpoint(arguments.folder)
    publish(arguments.file, lambda path: torch.save(whole, path))


if __name__ == "__main__":
    main()
