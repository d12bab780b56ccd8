"""The identity of a model: a hash of everything that its outputs depend on.

It is taken of the whole object, not of a list of settings: the weights and buffers with their dtypes, and every plain value
that a module, its configuration or its tokenizer holds. What is left out is named here. A value that is wrongly left out
leads to the reuse of wrong results, and one that is wrongly included only to work that is done again.
"""

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

LEFT_OUT = frozenset(
    {
        "training",  # encoders run in evaluation mode
        "gradient_checkpointing",  # of memory, not of values
        "use_cache",
        "name_or_path",  # where a model came from
        "transformers_version",
        "model_card_data",
        "model_card_text",
        "trust_remote_code",
        "init_kwargs",  # repeats the settings of a tokenizer
        "backend",
        "vocab_file",  # where a tokenizer was read from; what it does is hashed
        "merges_file",
        "tokenizer_file",
        "files_loaded",
        "init_inputs",
        "deprecation_warnings",  # which warnings were given
        "verbose",
    }
)
"""Names of values that the outputs do not depend on. Names that begin with an underscore are left out too."""
_DEPTH = 8
"""How deep objects in objects are described. Deeper ones count by their type."""


def identity(model: nn.Module) -> str:
    """Hash the weights, the buffers and the settings of a model, of all its parts and of its tokenizer.

    Args:
        model: The model. It may be on any device.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten()
        digest.update(content.view(torch.uint8).numpy().data)
    settings = {name: _settings(module) for name, module in model.named_modules()}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _settings(module: nn.Module) -> Any:
    return _describe(module, _DEPTH)


def _describe(value: Any, depth: int) -> Any:
    """Return what a value holds, as JSON. Objects that cannot be described are represented by their type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, PurePath)):
        return str(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, partial):
        return ["partial", _describe(value.func, depth), _describe([value.args, value.keywords], depth - 1)]
    if hasattr(value, "backend_tokenizer"):
        return [kind, _tokenizer(value), _plain(vars(value), depth - 1)]
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if depth == 0:
        return kind
    if isinstance(value, Mapping):
        return {str(key): _describe(each, depth - 1) for key, each in value.items() if not _is_left_out(str(key))}
    if isinstance(value, (list, tuple)):
        return [_describe(each, depth - 1) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_describe(each, depth - 1)) for each in value)
    if callable(described := getattr(value, "to_dict", None)) and not isinstance(value, nn.Module):
        return [kind, _describe(described(), depth - 1)]
    if isinstance(value, nn.Module):
        # Its parts are described by themselves, and its weights and buffers are hashed.
        return [kind, _plain({k: v for k, v in vars(value).items() if not isinstance(v, nn.Module)}, depth - 1)]
    return [kind, _plain(getattr(value, "__dict__", {}), depth - 1)]


def _plain(values: Mapping[str, Any], depth: int) -> dict[str, Any]:
    return {name: _describe(value, depth) for name, value in sorted(values.items()) if not _is_left_out(name)}


def _is_left_out(name: str) -> bool:
    return name.startswith("_") or name in LEFT_OUT


def _tokenizer(tokenizer: Any) -> str:
    """Hash a fast tokenizer of transformers. Its padding and truncation change with each use, so they are left out."""
    import tokenizers

    model = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    model.no_padding()
    model.no_truncation()
    longest = min(int(tokenizer.model_max_length), 1 << 60)
    return hashlib.sha256(f"{longest} {tokenizer.padding_side} {model.to_str()}".encode()).hexdigest()
