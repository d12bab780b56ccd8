"""Building backbones from the descriptions in configurations and checkpoints."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

Backbone = Callable[[], nn.Module]
"""A factory that builds a backbone. The command line turns `class_path` and `init_args` of a YAML file into one."""


def backbone_spec(model: nn.Module) -> dict[str, Any] | None:
    """Return the ``{class_path, init_args}`` that rebuilds the model, or None if the model has no ``init_args``."""
    init_args = getattr(model, "init_args", None)
    if not isinstance(init_args, dict):
        return None
    # FSDP replaces the class by a subclass of (FSDPModule, original class), so the original class is third in the MRO.
    kind = type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": init_args}


def has_own_weights(model: nn.Module) -> bool:
    """Return whether building the model also loads its weights, as in `PretrainedLM`. Adapters can then be added at once."""
    return bool(getattr(model, "pretrained", False))


def backbone_class(spec: dict[str, Any]) -> type[nn.Module]:
    """Return the class that the ``class_path`` of a description names.

    Raises:
        ValueError: If it names no ``nn.Module``.
    """
    path, _, name = str(spec.get("class_path", "")).rpartition(".")
    # A name without a module is a public name of this package, as in YAML.
    try:
        found = getattr(import_module(path or "lightning_align"), name, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"The `class_path` of `backbone` must be an importable nn.Module, but got {spec.get('class_path')!r}. Pass "
            "the full path of a class, such as 'lightning_align.PaLM'."
        )
    return found


def build_backbone(backbone: nn.Module | Backbone | dict[str, Any]) -> nn.Module:
    """Build a backbone.

    Args:
        backbone: A module (returned unchanged), a factory, or the ``{class_path, init_args}`` of a checkpoint.

    Raises:
        ValueError: If the result is not an ``nn.Module``.
    """
    if isinstance(backbone, nn.Module):
        return backbone
    if isinstance(backbone, dict):
        return backbone_class(backbone)(**backbone.get("init_args", {}))
    model = backbone()
    if not isinstance(model, nn.Module):
        raise ValueError(f"The factory `backbone` must return an nn.Module, but returned a {type(model).__name__}.")
    return model
