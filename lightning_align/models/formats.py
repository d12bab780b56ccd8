"""Writing and reading models and adapters: folders of transformers (which vLLM can serve), of PEFT and of this package."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
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
    """Copy all weights to the CPU, each to its own memory. If they are sharded, all ranks must call this (a collective)."""
    weights = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        weights[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return weights


def merged_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the active adapters into the weights, and return them under the names of the model without adapters.

    Args:
        model: The model, which says which adapters are active.
        weights: Its weights, from `whole_weights`. They are not changed.
    """
    plain = {name: value for name, value in weights.items() if ".lora." not in f".{name}"}
    for name, layer in lora_layers(model):
        for scope in layer.active:
            adapter = f"{name}.lora.{scope}"
            term = (weights[f"{adapter}.A"] @ weights[f"{adapter}.B"]).T * layer.lora[scope].scale  # type: ignore[operator]
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + term
    return plain


def transformers_weights(model: PretrainedLM, weights: Mapping[str, Tensor]) -> tuple[PretrainedLM, dict[str, Tensor]]:
    """Return the weights under the names that transformers uses, with PEFT adapters merged, and the model that they fit.

    Args:
        model: The model. It may be sharded and is not changed.
        weights: Its weights, from `merged_weights`.

    Returns:
        The model without PEFT adapters (a copy if it has any), and its weights.
    """
    if has_peft(model.model):
        # Merge in a copy, because the training model may be sharded.
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
    eos_ids: Sequence[int] = (),
    card: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a model with its tokenizer and its model card.

    A `PretrainedLM` is written for `AutoModelForCausalLM.from_pretrained`. Any other model with ``init_args`` is written for
    `read_model`: a ``config.json`` with ``class_path`` and ``init_args``, and a safetensors file.

    Args:
        model: The model.
        weights: Its weights, from `merged_weights`. This function merges PEFT adapters itself.
        folder: The folder to write. It is created with its parents. It must be empty or contain an earlier export.
        tokenizer: A tokenizer of this package. One that wraps a tokenizer of transformers is written in the format of
            transformers.
        eos_ids: The ids that end a response, for the generation settings (``generation_config.json``) of a `PretrainedLM`.
            Default is what the model declares.
        card: The text of the model card.
        max_shard_size: The maximum size of a weights file, for a `PretrainedLM`.

    Raises:
        ValueError: If the folder contains other files, or the model has no ``init_args``.
    """
    folder = Path(folder)
    _check_folder(folder, CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PretrainedLM):
        model, state = transformers_weights(model, weights)
        model.model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        _write_ends(folder / "generation_config.json", eos_ids or model.eos_ids)
    else:
        spec = backbone_spec(model)
        if spec is None:
            raise ValueError(
                f"`model` must have `init_args`, from which it can be rebuilt, but got a {type(model).__name__} without them. "
                "Write its `state_dict()` with safetensors instead."
            )
        publish(folder / WEIGHTS, lambda path: save_file(dict(weights), path))
        publish_text(folder / CONFIG, json.dumps(spec, indent=2) + "\n")
    if tokenizer is not None and hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    if card is not None:
        publish_text(folder / CARD, card)
    _copy_permissions(folder / CONFIG)


def _write_ends(path: Path, eos_ids: Sequence[int]) -> None:
    """Write the end-of-sequence ids into generation settings. Engines end responses at all of them."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if eos_ids:
        settings["eos_token_id"] = int(eos_ids[0]) if len(eos_ids) == 1 else [int(token) for token in eos_ids]
        publish_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def read_model(folder: str | Path) -> nn.Module:
    """Read a model that `write_model` wrote, of this package or of transformers.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the folder does not contain a model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} must contain {CONFIG}, but does not. Pass a folder that `lightning-align export` wrote.")
    spec = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if "class_path" not in spec:
        return PretrainedLM(str(folder)).eval()
    model = build_backbone(spec)
    load_weights(model, load_file(folder / WEIGHTS), folder)
    return model.eval()


def _copy_permissions(config: Path) -> None:
    """Give the weights the permissions of the configuration, because safetensors makes them readable only by their owner."""
    for file in config.parent.glob("*.safetensors"):
        shutil.copymode(config, file)


def _check_folder(folder: Path, mark: str) -> None:
    if folder.is_file():
        raise ValueError(f"`folder` must be a folder, but {folder} is a file. Pass another path.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise ValueError(
            f"`folder` must be empty or contain an earlier export, but {folder} contains other files and no {mark}. "
            "Pass another path."
        )


# -- adapters in the format of PEFT


def write_adapter(model: nn.Module, weights: Mapping[str, Tensor], folder: str | Path, *, scope: str = "default") -> None:
    """Write one scope of adapters in the format of PEFT, for `PeftModel.from_pretrained` and for servers that load LoRA.

    Args:
        model: The model that has the adapters.
        weights: Its weights, from `whole_weights`.
        folder: The folder to write. It is created with its parents. It must be empty or contain an earlier adapter.
        scope: The scope to write. Ignored if the adapters are those of PEFT.

    Raises:
        ValueError: If the model has no such scope, or the folder contains other files.
    """
    layers = lora_layers(model, scope)
    of_peft = isinstance(model, PretrainedLM) and has_peft(model.model)
    if not layers and not of_peft:
        raise ValueError(f"The model has no adapters of scope {scope!r}. Pass a scope that `add_lora` added.")
    folder = Path(folder)
    _check_folder(folder, ADAPTER_CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    if of_peft:
        inner: Any = model.model
        inner.save_pretrained(folder, state_dict={name.removeprefix("model."): value for name, value in weights.items()})
        _copy_permissions(folder / ADAPTER_CONFIG)
        return
    wrapper = "model." if isinstance(model, PretrainedLM) else ""
    ranks = {int(weights[f"{name}.lora.{scope}.A"].shape[1]) for name, _ in layers}
    assert len(ranks) == 1, "a scope has one rank"
    rank = ranks.pop()
    state: dict[str, Tensor] = {}
    for name, _ in layers:
        peft_name = f"{PREFIX}{name.removeprefix(wrapper)}"
        state[f"{peft_name}.lora_A.weight"] = weights[f"{name}.lora.{scope}.A"].T.contiguous()
        state[f"{peft_name}.lora_B.weight"] = weights[f"{name}.lora.{scope}.B"].T.contiguous()
    first: Any = layers[0][1].lora[scope]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.init_args["name"] if isinstance(model, PretrainedLM) else None,
        "r": rank,
        "lora_alpha": first.scale * rank,  # includes the scaling of rank-stabilized LoRA
        "lora_dropout": first.dropout.p,
        "target_modules": sorted(name.removeprefix(wrapper) for name, _ in layers),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    publish(folder / ADAPTER_WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    publish_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    _copy_permissions(folder / ADAPTER_CONFIG)


def read_adapter(model: nn.Module, folder: str | Path, *, scope: str = "default") -> list[str]:
    """Add the adapters of a PEFT folder to a model, as an active scope.

    Args:
        model: The base model that the adapters were trained on. It is changed in place.
        folder: A folder with adapter_config.json and adapter_model.safetensors.
        scope: The name of the new scope.

    Returns:
        The names of the layers that got an adapter.

    Raises:
        ValueError: If the adapters are not plain LoRA, or do not fit the model.
    """
    folder = Path(folder)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"adapter {folder} must contain {file}, but does not. Pass a folder that PEFT's save_pretrained wrote "
                "(safetensors)."
            )
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    unknown = [key for key in ("use_dora", "fan_in_fan_out", "layer_replication", "modules_to_save") if config.get(key)]
    unknown += [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or unknown or config.get("bias", "none") != "none":
        raise ValueError(
            f"adapter {folder} must be plain LoRA, but is {config.get('peft_type')} with {', '.join(unknown) or 'biases'}. "
            "Merge such adapters into their base with PEFT's merge_and_unload."
        )
    wrapper = "model." if isinstance(model, PretrainedLM) else ""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / ADAPTER_WEIGHTS).items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(
                f"adapter {folder} must contain only adapters of linear layers, but contains {key}. Merge such adapters into "
                "their base with PEFT's merge_and_unload."
            )
        halves.setdefault(wrapper + match[1], {})[match[2]] = value
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, half in halves.items():
        shape = None if name not in linears else (linears[name].in_features, linears[name].out_features)
        if shape is None or (half["A"].shape[1], half["B"].shape[0]) != shape:
            raise ValueError(
                f"adapter {folder} is of another base model than this {type(model).__name__}: {name} maps {half['A'].shape[1]} "
                f"to {half['B'].shape[0]} features in the adapter, but "
                f"{'does not exist' if shape is None else f'maps {shape[0]} to {shape[1]}'} in the model. Pass the base model "
                "that the adapters were trained on."
            )
    other_scopes = {s for _, layer in lora_layers(model) for s in layer.active}
    settings = LoRAConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=list(halves),
        rslora=config.get("use_rslora", False),
        scope=scope,
    )
    names = add_lora(model, settings)
    use_lora(model, *sorted(other_scopes), scope)
    with torch.no_grad():
        for name, layer in lora_layers(model, scope):
            adapter: Any = layer.lora[scope]
            adapter.A.copy_(halves[name]["A"].T)
            adapter.B.copy_(halves[name]["B"].T)
    return names
