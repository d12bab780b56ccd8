"""Checks before training that a model can be exported after it."""

import json
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.merging import merged_weights, whole_weights
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.proof import expected_logits, prove
from lightning_align.models.weights import load_weights
from lightning_align.runtime.ranks import is_sharded


def check_rebuildable(model: nn.Module) -> None:
    """Check that a folder can describe a model, and that what is built from the description is the same model.

    A model of this package or of the user is built again and compared. A model of transformers describes itself.

    Args:
        model: The model with its initial weights. It is not changed.

    Raises:
        ValueError: If the model has no ``init_args``, they cannot be written, its class cannot be imported, or the model that
            is built from them is another one.
    """
    spec, kind = backbone_spec(model), type(model).__name__
    if spec is None:
        raise ValueError(
            f"ExportModel: the policy must have `init_args`, from which it can be rebuilt, but is a {kind} without them. "
            "Remove the callback and save its `state_dict()`, or give the class a dictionary `init_args`."
        )
    extra = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if extra:
        raise ValueError(
            f"ExportModel: the state of the policy must be tensors, but {', '.join(extra[:3])} of {kind} is not. Register it "
            "as a buffer, or set it from `init_args`."
        )
    if isinstance(model, PretrainedLM):
        return
    try:
        json.dumps(spec)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"ExportModel: the `init_args` of {kind} must be values that JSON can hold, but are not ({error}). Keep numbers, "
            "texts, lists and dictionaries in them."
        ) from error
    module, _, name = spec["class_path"].rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        found = None
    if found is None:
        raise ValueError(
            f"ExportModel: the class of the policy must be importable as {spec['class_path']}, but is not. Define it at the "
            "top level of a module."
        )
    parts = any(isinstance(part, PretrainedLM) for part in model.modules())
    if parts or is_sharded(model) or any(parameter.is_meta for parameter in model.parameters()):
        return  # too large to build twice
    _rebuild(model, spec, kind)


def _rebuild(model: nn.Module, spec: dict[str, Any], kind: str) -> None:
    expected = expected_logits(model)
    try:
        with torch.random.fork_rng(devices=[]):
            again = build_backbone(spec)
        load_weights(again, merged_weights(model, whole_weights(model)), "of the policy")
        prove(again, expected, "its `init_args`")
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"ExportModel: the `init_args` of {kind} must rebuild it, but do not ({str(error)[:300]}). Put all arguments of "
            "its constructor into them."
        ) from error


def check_formats(model: nn.Module, *, max_shard_size: str) -> None:
    """Check what the format of transformers cannot hold.

    Args:
        model: The model.
        max_shard_size: The largest size of a file of weights.

    Raises:
        ValueError: If the base model is quantized, or ``max_shard_size`` is not a size.
    """
    if not isinstance(model, PretrainedLM):
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({"weight": torch.zeros(1)}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(f"`max_shard_size` must be a size such as 5GB or 200MB, but got {max_shard_size!r}.") from error
    if getattr(model.model, "hf_quantizer", None) is not None:
        raise ValueError(
            "ExportModel: the base model is quantized, and merging adapters into it would round what was trained. Write the "
            "adapters alone: set `adapter_only: true`."
        )


def export_bytes(model: nn.Module, *, adapter_only: bool) -> int:
    """Return the number of bytes of the weights that an export writes.

    Args:
        model: The model.
        adapter_only: Whether only parameters that train are written.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad or not adapter_only]
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
