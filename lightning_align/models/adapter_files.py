"""Writing and reading adapters: folders of PEFT."""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.embeddings import trains_rows_whole
from lightning_align.models.folders import CARD, check_folder, replaced_folder, write_tokenizer
from lightning_align.models.integrity import read_tensors
from lightning_align.models.lora import (
    LoRAConfig,
    LoRALayer,
    add_lora,
    features,
    linear_layers,
    lora_layers,
    use_lora,
    using_lora,
)
from lightning_align.models.merging import plain_weights, without_peft
from lightning_align.models.peft_adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, add_peft, has_peft
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.proof import Expected, expected_logits, prove
from lightning_align.models.weights import load_weights
from lightning_align.runtime.checksums import check_sums, read_object
from lightning_align.runtime.files import publish, publish_text


def write_adapter(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    *,
    scope: str = "default",
    tokenizer: Any = None,
    card: Callable[[str | None], str] | None = None,
    expected: Expected | None = None,
) -> None:
    """Write one scope of adapters in the format of PEFT, for `PeftModel.from_pretrained` and for servers that load LoRA.

    The adapters are read back and compared on the base model that they name. If the base model has other weights than the
    model of that name, as after full training, the adapters name none.

    Args:
        model: The model that has the adapters.
        weights: Its weights, from `whole_weights`.
        folder: The folder to write. It is created with its parents. It must be empty or contain an earlier adapter.
        scope: The scope to write. Ignored if the adapters are those of PEFT.
        tokenizer: As for `write_model`. Default is none, because the base model has one.
        card: A function that returns the text of the model card. It gets the base model that the adapters name, or None.
        expected: What the model computes, from `expected_adapter_logits`. Needed only if the model is sharded.

    Raises:
        ValueError: If the model has no such scope, the folder contains other files, the adapters cannot be separated from their
            base model, or the model does not compute the same with the adapters that are read back.
    """
    layers = lora_layers(model, scope)
    of_peft = isinstance(model, PretrainedLM) and has_peft(model.model)
    if not layers and not of_peft:
        raise ValueError(f"The model has no adapters of scope {scope!r}. Pass a scope that `add_lora` added.")
    check_folder(folder, ADAPTER_CONFIG)
    expected = expected or expected_adapter_logits(model, scope)
    base = _named_base(model, weights)
    with replaced_folder(folder, ADAPTER_CONFIG) as partial:
        if of_peft:
            assert isinstance(model, PretrainedLM)
            _write_peft(model, weights, partial)
        else:
            _write_lora(model, layers, weights, partial, scope=scope)
        write_tokenizer(tokenizer, partial)
        if base is None:
            _forget_base(partial)
        if card is not None:
            publish_text(partial / CARD, card(None if base is None else str(base.init_args["name"])))
        read = base if base is not None else _base_in_memory(model, weights)
        if read is not None:
            if of_peft:
                assert isinstance(read, PretrainedLM)
                add_peft(read.model, str(partial))
            else:
                read_adapter(read, partial, scope=scope)
            prove(read, expected, folder)
    if base is None and isinstance(model, PretrainedLM) and model.init_args["name"] is not None:
        rank_zero_info(
            f"The adapters in {folder} belong to a model with other weights than {model.init_args['name']}, so they do not "
            "name their base model. Export the checkpoint that the run started from, and load the adapters onto it."
        )


def expected_adapter_logits(model: nn.Module, scope: str = "default") -> Expected:
    """Compute the logits of the fixed batch with one scope of adapters. If the weights are sharded, this is a collective.

    Args:
        model: The model that has the adapters.
        scope: The scope. Ignored if the adapters are those of PEFT.

    Raises:
        ValueError: If the adapters are PEFT's and moved the base weights when they were created.
    """
    check_separable(model)
    if not lora_layers(model, scope):
        return expected_logits(model)
    with using_lora(model, scope):
        return expected_logits(model)


def check_separable(model: nn.Module) -> None:
    """Check that the adapters of a model can be written without the base model.

    Raises:
        ValueError: If the adapters are PEFT's and moved the base weights when they were created.
    """
    if isinstance(model, PretrainedLM) and has_peft(model.model) and model.start is not None and not model.start.off_is_base:
        raise ValueError(
            "PEFT adapters that change the weights of the base model, such as `init_lora_weights: pissa` or a trained bias, "
            "cannot be written alone. Write the merged model: remove `adapter_only`."
        )


def _named_base(model: nn.Module, weights: Mapping[str, Tensor]) -> PretrainedLM | None:
    """Load the base model by the name that adapters give to it, or return None if it is another model or has no name."""
    if not isinstance(model, PretrainedLM) or model.init_args["name"] is None:
        return None
    arguments: dict[str, Any] = {**model.init_args, "gradient_checkpointing": False, "adapter": None}
    base = PretrainedLM(**arguments)
    if not base.is_loaded:
        return None
    # PEFT renames the weights of layers with adapters, and does not rename the others.
    names = {re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name): name for name in weights}
    for name, value in base.state_dict().items():
        trained = weights.get(names.get(name, name))
        if trained is None or trained.shape != value.shape or not torch.equal(trained, value.to(trained.dtype)):
            return None
    return base


def _base_in_memory(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module | None:
    """Build the base model from the frozen weights, or return None if the model does not say how it is built."""
    if isinstance(model, PretrainedLM) and has_peft(model.model):
        return without_peft(model, weights, merge=False)
    spec = backbone_spec(model)
    if spec is None:
        return None
    base = build_backbone(spec)
    load_weights(base, plain_weights(weights), "the frozen weights")
    return base


def _forget_base(folder: Path) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    publish_text(folder / ADAPTER_CONFIG, json.dumps({**config, "base_model_name_or_path": None}, indent=2) + "\n")


def _write_peft(model: PretrainedLM, weights: Mapping[str, Tensor], folder: Path) -> None:
    inner: Any = model.model
    state = {name.removeprefix("model."): value for name, value in weights.items()}
    with warnings.catch_warnings():
        # PEFT then also writes the embeddings, which is right for adapters on them.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        if not trains_rows_whole(inner) or not model.num_new_tokens:
            inner.save_pretrained(folder, state_dict=state)
            return
    # PEFT would also write the embeddings because they were resized, and could not read them back: their rows that train are
    # in the adapters already.
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(inner, state_dict=state, save_embedding_layers=False)
    found = {f"{PREFIX}{name}": value.contiguous() for name, value in found.items()}
    publish(folder / ADAPTER_WEIGHTS, lambda path: save_file(found, path, metadata={"format": "pt"}))
    (config,) = inner.peft_config.values()
    config.save_pretrained(folder)


def _write_lora(
    model: nn.Module, layers: list[tuple[str, LoRALayer]], weights: Mapping[str, Tensor], folder: Path, *, scope: str
) -> None:
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
        "fan_in_fan_out": first.transposed,
        "inference_mode": True,
    }
    publish(folder / ADAPTER_WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    publish_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


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
    check_sums(folder)
    config = read_object(folder / ADAPTER_CONFIG)
    others, kind = beyond_plain_lora(config), str(config.get("peft_type"))
    if others or kind != "LORA":
        raise ValueError(
            f"adapter {folder} must be plain LoRA, but is {kind}{' with ' if others else ''}{', '.join(others)}. "
            f"{_other_way(model, folder)}"
        )
    wrapper = "model." if isinstance(model, PretrainedLM) else ""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(folder / ADAPTER_WEIGHTS).items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(
                f"adapter {folder} must contain only adapters of linear layers, but contains {key}. {_other_way(model, folder)}"
            )
        halves.setdefault(wrapper + match[1], {})[match[2]] = value
    linears = linear_layers(model)
    for name, half in halves.items():
        shape = None if name not in linears else features(linears[name])
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


PLAIN = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "qalora_group_size", "megatron_core", "ensure_weight_tying", "runtime_config"),
    *("loftq_config", "eva_config"),
}
"""The settings of PEFT's LoRA that do not change what adapters compute, given the layers and values in the file."""
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Starts of LoRA that change the weights of the base model, so that the adapters are not of the base model alone."""


def beyond_plain_lora(config: Mapping[str, Any]) -> list[str]:
    """Return the settings in a configuration of PEFT that the adapters of this package do not have.

    Settings of later versions of PEFT count among them, because they may change what the adapters compute.

    Args:
        config: The content of adapter_config.json.
    """
    if config.get("peft_type") != "LORA":
        return []
    found = [key for key, value in config.items() if key not in {*PLAIN, "bias", "init_lora_weights"} and value not in NOTHING]
    start = str(config.get("init_lora_weights", True)).lower()
    found += [f"init_lora_weights: {start}"] if start.startswith(MOVES_BASE) else []
    return found + ([f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else [])


NOTHING: tuple[Any, ...] = (None, False, [], {}, "")


def _other_way(model: nn.Module, folder: Path) -> str:
    if isinstance(model, PretrainedLM):
        return f"PEFT reads it: `PretrainedLM(name, adapter={str(folder)!r})`."
    return "Merge such adapters into their base with PEFT's merge_and_unload."
