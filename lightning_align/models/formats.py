"""Models as others read them: folders of transformers, which vLLM serves, adapters of PEFT, and folders of this package."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.lora import LoRAConfig, add_lora, lora_layers, use_lora
from lightning_align.models.peft_adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, has_peft, merge_peft
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.weights import load_weights
from lightning_align.runtime.files import publish, publish_text

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights on this rank, on the CPU and each in memory of its own; a collective where they are sharded."""
    weights = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        weights[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return weights


def merged_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with its active adapters in them, under the names that it has without adapters.

    Args:
        model: says which adapters are active.
        weights: from `whole_weights`; not changed.
    """
    plain = {name: value for name, value in weights.items() if ".lora." not in f".{name}"}
    for name, layer in lora_layers(model):
        for scope in layer.active:
            adapter = f"{name}.lora.{scope}"
            term = (weights[f"{adapter}.A"] @ weights[f"{adapter}.B"]).T * layer.lora[scope].scale  # type: ignore[operator]
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + term
    return plain


def transformers_weights(model: PretrainedLM, weights: Mapping[str, Tensor]) -> tuple[PretrainedLM, dict[str, Tensor]]:
    """The weights of a model of transformers under its own names, adapters of PEFT merged, and the model that they fit.

    Args:
        model: may be sharded; not changed.
        weights: from `merged_weights`.
    """
    if has_peft(model.model):
        # In a copy of its own, since the one that trains may be sharded.
        copied = PretrainedLM(**model.init_args)
        load_weights(copied, dict(weights), "the weights to merge")
        merge_peft(copied.model)
        model, weights = copied, whole_weights(copied)
    return model, {name.removeprefix("model."): value for name, value in weights.items()}


def write_model(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    card: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a model with its tokenizer and its card.

    A `PretrainedLM` becomes what `AutoModelForCausalLM.from_pretrained` reads; any other model that says how it is built
    becomes a ``config.json`` with ``class_path`` and ``init_args``, and a safetensors file, which `read_model` reads.

    Args:
        model: whose weights these are; our own adapters must be merged into them, those of PEFT are merged here.
        weights: from `merged_weights`.
        folder: is made, with the folders above it; must be empty or hold an earlier export.
        tokenizer: of this package; one of transformers is written in its own form.
        card: text of the model card.
        max_shard_size: of a file of weights, for a `PretrainedLM`.

    Raises:
        ValueError: if something else is in the folder, or the model does not say how it is built.
    """
    folder = Path(folder)
    _check_folder(folder, CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PretrainedLM):
        model, state = transformers_weights(model, weights)
        model.model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    else:
        spec = backbone_spec(model)
        if spec is None:
            raise ValueError(
                f"the model is a {type(model).__name__}, which keeps no `init_args`, so nothing could build it again: write "
                "its `state_dict()` with safetensors instead"
            )
        publish(folder / WEIGHTS, lambda path: save_file(dict(weights), path))
        publish_text(folder / CONFIG, json.dumps(spec, indent=2) + "\n")
    if tokenizer is not None and hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    if card is not None:
        publish_text(folder / CARD, card)
    _open_like(folder / CONFIG)


def read_model(folder: str | Path) -> nn.Module:
    """A model that `write_model` wrote, of this package or of transformers, in evaluation mode.

    Raises:
        ValueError: if the folder holds none.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: has no {CONFIG}, expected a folder that `lightning-align export` wrote")
    spec = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if "class_path" not in spec:
        return PretrainedLM(str(folder)).eval()
    model = build_backbone(spec)
    load_weights(model, load_file(folder / WEIGHTS), folder)
    return model.eval()


def _open_like(config: Path) -> None:
    """Let whoever may read the configuration read the weights beside it: safetensors writes them for their owner alone."""
    for file in config.parent.glob("*.safetensors"):
        shutil.copymode(config, file)


def _check_folder(folder: Path, mark: str) -> None:
    if folder.is_file():
        raise ValueError(f"{folder}: is a file, expected a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise ValueError(f"{folder}: holds other files and no {mark}; give an empty folder, or one of an earlier export")


# -- adapters, as PEFT has them


def write_adapter(model: nn.Module, weights: Mapping[str, Tensor], folder: str | Path, *, scope: str = "default") -> None:
    """Write one scope of adapters as PEFT does, for `PeftModel.from_pretrained` and for servers that load LoRA.

    Args:
        model: that has the scope.
        weights: its weights, from `whole_weights`.
        folder: is made; must be empty or hold an earlier adapter.
        scope: which adapters, where they are our own and not PEFT's.

    Raises:
        ValueError: if the model has no such scope, or something else is in the folder.
    """
    layers = lora_layers(model, scope)
    of_peft = isinstance(model, PretrainedLM) and has_peft(model.model)
    if not layers and not of_peft:
        raise ValueError(f"the model has no adapters of scope {scope!r} to write")
    folder = Path(folder)
    _check_folder(folder, ADAPTER_CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    if of_peft:
        inner: Any = model.model
        inner.save_pretrained(folder, state_dict={name.removeprefix("model."): value for name, value in weights.items()})
        _open_like(folder / ADAPTER_CONFIG)
        return
    inside = "model." if isinstance(model, PretrainedLM) else ""
    ranks = {int(weights[f"{name}.lora.{scope}.A"].shape[1]) for name, _ in layers}
    assert len(ranks) == 1, "a scope has one rank"
    rank = ranks.pop()
    state: dict[str, Tensor] = {}
    for name, _ in layers:
        theirs = f"{PREFIX}{name.removeprefix(inside)}"
        state[f"{theirs}.lora_A.weight"] = weights[f"{name}.lora.{scope}.A"].T.contiguous()
        state[f"{theirs}.lora_B.weight"] = weights[f"{name}.lora.{scope}.B"].T.contiguous()
    first: Any = layers[0][1].lora[scope]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.init_args["name"] if isinstance(model, PretrainedLM) else None,
        "r": rank,
        "lora_alpha": first.scale * rank,  # with the scaling of rank-stabilised LoRA in it
        "lora_dropout": first.dropout.p,
        "target_modules": sorted(name.removeprefix(inside) for name, _ in layers),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    publish(folder / ADAPTER_WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    publish_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    _open_like(folder / ADAPTER_CONFIG)


def read_adapter(model: nn.Module, folder: str | Path, *, scope: str = "default") -> list[str]:
    """Add the adapters of a PEFT folder to a model, as a scope in use.

    Args:
        model: the base that they were trained on; changed in place.
        folder: with adapter_config.json and adapter_model.safetensors.
        scope: the name that they get.

    Returns:
        Names of the layers that got one.

    Raises:
        ValueError: if these are no plain LoRA adapters, or not of this model.
    """
    folder = Path(folder)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"adapter {folder}: has no {file}, expected a folder that PEFT's save_pretrained wrote (safetensors)"
            )
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    unknown = [key for key in ("use_dora", "fan_in_fan_out", "layer_replication", "modules_to_save") if config.get(key)]
    unknown += [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or unknown or config.get("bias", "none") != "none":
        raise ValueError(
            f"adapter {folder}: is of kind {config.get('peft_type')} with {', '.join(unknown) or 'biases'}; plain LoRA can be "
            "read: merge others into their base with PEFT's merge_and_unload"
        )
    inside = "model." if isinstance(model, PretrainedLM) else ""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / ADAPTER_WEIGHTS).items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"adapter {folder}: holds {key}, which is no part of a linear layer's adapter")
        halves.setdefault(inside + match[1], {})[match[2]] = value
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, half in halves.items():
        shape = None if name not in linears else (linears[name].in_features, linears[name].out_features)
        if shape is None or (half["A"].shape[1], half["B"].shape[0]) != shape:
            raise ValueError(
                f"adapter {folder}: is of another base than this {type(model).__name__}: {name} takes {half['A'].shape[1]} to "
                f"{half['B'].shape[0]} there and {'does not exist' if shape is None else f'{shape[0]} to {shape[1]}'} here"
            )
    others = {s for _, layer in lora_layers(model) for s in layer.active}
    settings = LoRAConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=list(halves),
        rslora=config.get("use_rslora", False),
        scope=scope,
    )
    names = add_lora(model, settings)
    use_lora(model, *sorted(others), scope)
    with torch.no_grad():
        for name, layer in lora_layers(model, scope):
            adapter: Any = layer.lora[scope]
            adapter.A.copy_(halves[name]["A"].T)
            adapter.B.copy_(halves[name]["B"].T)
    return names
