"""Backbones: how a model is described in a configuration or a checkpoint, and built from that."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

Backbone = Callable[[], nn.Module]
"""How a backbone is given: a factory, which is what a YAML file's class_path and init_args become."""


def backbone_spec(model: nn.Module) -> dict[str, Any] | None:
    """``{class_path, init_args}`` that builds the model again, for models that keep their ``init_args``; else None."""
    init_args = getattr(model, "init_args", None)
    if not isinstance(init_args, dict):
        return None
    # Sharding puts a class of its own, and FSDPModule, before a model's.
    kind = type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": init_args}


def has_own_weights(model: nn.Module) -> bool:
    """Whether building the model reads its weights, as `PretrainedLM` does, so that adapters can be put on it at once."""
    return bool(getattr(model, "pretrained", False))


def build_backbone(backbone: nn.Module | Backbone | dict[str, Any]) -> nn.Module:
    """Build a backbone from whatever describes it.

    Args:
        backbone: a module (returned as it is), a factory, or ``{class_path, init_args}`` as a checkpoint keeps it.

    Raises:
        ValueError: if it does not lead to an ``nn.Module``.
    """
    if isinstance(backbone, nn.Module):
        return backbone
    if isinstance(backbone, dict):
        path, _, name = str(backbone.get("class_path", "")).rpartition(".")
        # A bare name is one of the package's own, as in YAML.
        try:
            found = getattr(import_module(path or "lightning_align"), name, None)
        except ImportError:
            found = None
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(f"backbone: class_path {backbone.get('class_path')!r} is no nn.Module")
        return found(**backbone.get("init_args", {}))
    model = backbone()
    if not isinstance(model, nn.Module):
        raise ValueError(f"backbone: the factory returned a {type(model).__name__}; it must return an nn.Module")
    return model
