"""Writing and reading whole models: folders of transformers (which vLLM can serve) and of this package."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_align.models.adapter_files import read_adapter, write_adapter
from lightning_align.models.building import backbone_class, backbone_spec, build_backbone
from lightning_align.models.composed import FrozenParts, check_exportable
from lightning_align.models.folders import CARD, check_folder, replaced_folder, write_tokenizer
from lightning_align.models.integrity import read_tensors
from lightning_align.models.merging import embedding_names, merged_weights, transformers_weights, whole_weights
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.proof import Expected, expected_logits, prove, prove_embeddings, read_transformers
from lightning_align.models.weights import load_weights
from lightning_align.runtime.checksums import check_sums, read_object
from lightning_align.runtime.files import publish, publish_text
from lightning_align.runtime.ranks import is_sharded

__all__ = [
    "merged_weights",
    "read_adapter",
    "read_model",
    "transformers_weights",
    "whole_weights",
    "write_adapter",
    "write_model",
]
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_model(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    eos_ids: Sequence[int] = (),
    card: str | None = None,
    max_shard_size: str = "5GB",
    expected: Expected | None = None,
    frozen: FrozenParts = "whole",
    part_tokenizers: Sequence[Any] = (),
) -> None:
    """Write a model with its tokenizer and its model card, and check that what was written is what was trained.

    A `PretrainedLM` is written for `AutoModelForCausalLM.from_pretrained`, which also reads a `PaLM` where this package is
    imported. Any other model with ``init_args`` is written for
    `read_model`: a ``config.json`` with ``class_path`` and ``init_args``, and a safetensors file. The files replace those of
    an earlier export in the folder.

    Args:
        model: The model.
        weights: Its weights, from `merged_weights`. This function merges PEFT adapters itself.
        folder: The folder to write. It is created with its parents. It must be empty or contain an earlier export.
        tokenizer: A tokenizer of this package or of transformers. It is written in the format of transformers.
        eos_ids: The ids that end a response, for the generation settings (``generation_config.json``) of a `PretrainedLM`.
            Default is what the model declares.
        card: The text of the model card.
        max_shard_size: The maximum size of a weights file, for a `PretrainedLM`.
        expected: What the model computes, from `expected_logits`. Needed only if the model is sharded.
        frozen: How the folder holds the frozen models of a composition; see `lightning_align.calm.folder`.
        part_tokenizers: The tokenizers of the augments of a composition. None for an augment without its own.

    Raises:
        ValueError: If the folder contains other files, the model has no ``init_args``, or the model that is read back from the
            folder does not compute what the model computes. The folder then keeps the earlier export.
    """
    check_exportable(model, frozen)
    spec = backbone_spec(model)
    if spec is None:
        raise ValueError(
            f"`model` must have `init_args`, from which it can be rebuilt, but got a {type(model).__name__} without them. "
            "Write its `state_dict()` with safetensors instead."
        )
    if expected is None:
        if is_sharded(model):
            raise ValueError(
                "`expected` must be given for a sharded model, because its logits are a collective. Call `expected_logits` on "
                "all ranks, and pass the result."
            )
        check_folder(folder, CONFIG)
        expected = expected_logits(model)
    if (write := getattr(model, "write_folder", None)) is not None:
        options = {"eos_ids": eos_ids, "card": card, "max_shard_size": max_shard_size, "part_tokenizers": part_tokenizers}
        write(weights, folder, frozen=frozen, expected=expected, tokenizer=tokenizer, **options)
        return
    with replaced_folder(folder, CONFIG) as partial:
        if isinstance(model, PretrainedLM):
            _write_transformers(*transformers_weights(model, weights), partial, max_shard_size=max_shard_size)
            _write_ends(partial / "generation_config.json", eos_ids or model.eos_ids)
        else:
            publish(partial / WEIGHTS, lambda path: save_file(dict(weights), path))
            publish_text(partial / CONFIG, json.dumps({**_auto_keys(spec), **spec}, indent=2) + "\n")
        _prove(model, partial, expected, folder)
        write_tokenizer(tokenizer, partial)
        if card is not None:
            publish_text(partial / CARD, card)


def _auto_keys(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the keys by which the auto classes of transformers find the classes of `lightning_align.models.auto`."""
    if spec["class_path"] != f"{PaLM.__module__}.{PaLM.__qualname__}":
        return {}
    return {"model_type": "lightning_align", "architectures": ["LightningAlignForCausalLM"]}


def _write_transformers(model: PretrainedLM, state: dict[str, Tensor], folder: Path, *, max_shard_size: str) -> None:
    config = model.model.config
    declared, (embedding, output) = getattr(config, "tie_word_embeddings", False), embedding_names(model)
    if declared and embedding in state and output in state:
        if torch.equal(state[embedding], state[output]):
            del state[output]  # once in the files
        else:
            config.tie_word_embeddings = False  # merging an adapter has made them two layers
    try:
        model.model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    finally:
        config.tie_word_embeddings = declared


def _prove(model: nn.Module, partial: Path, expected: Expected, folder: str | Path) -> None:
    """Read a folder as its users do, and compare the model with the trained one."""
    if not isinstance(model, PretrainedLM):
        prove(read_model(partial), expected, folder)
        return
    inner = model.model
    kind = type(inner).__mro__[2] if isinstance(inner, FSDPModule) else type(inner)  # FSDP puts two classes in front
    read = read_transformers(partial, kind, attention=inner.config._attn_implementation)
    prove(read, expected, folder)
    if not is_sharded(model):
        prove_embeddings(model.model.get_input_embeddings(), read.get_input_embeddings(), folder)


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
        ValueError: If the folder does not contain a model, or a file was changed after it was written.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} must contain {CONFIG}, but does not. Pass a folder that `lightning-align export` wrote.")
    check_sums(folder)
    spec = read_object(folder / CONFIG)
    if "class_path" not in spec:
        return PretrainedLM(str(folder)).eval()
    if (read := getattr(backbone_class(spec), "read_folder", None)) is not None:
        composed: nn.Module = read(folder)
        return composed
    model = build_backbone(spec)
    load_weights(model, read_tensors(folder / WEIGHTS), folder)
    return model.eval()
