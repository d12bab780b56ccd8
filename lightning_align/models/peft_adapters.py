"""Adapters of PEFT within a model of transformers: of any kind that sits in its layers, such as DoRA. Needs the extra `hf`."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED = "inference_mode"
"""What PEFT says of adapters that it wrote; without it a configuration is that of new ones."""
PREFIX = "base_model.model."
"""What stands before the names of a model's layers in such a file."""


def add_peft(model: Any, adapter: str | dict[str, Any]) -> dict[str, Any]:
    """Put adapters into a model of transformers; from then on they alone train.

    Args:
        model: changed in place.
        adapter: folder that PEFT's ``save_pretrained`` wrote, or the configuration of new ones: the arguments of PEFT's own
            class, with ``peft_type`` where it is not LORA.

    Returns:
        The configuration, as a checkpoint can hold it.

    Raises:
        ValueError: if there are no such adapters, or they are of another base.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("PretrainedLM: `adapter` needs PEFT: pip install -c constraints.txt -e '.[cpu,hf]'")
    import peft

    if isinstance(adapter, dict):
        described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **adapter}
        try:
            config = peft.get_peft_config(dict(described))
            config.inference_mode = False  # as a file of trained ones says
            model.add_adapter(config)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"PretrainedLM: adapter {adapter} makes no adapters of PEFT ({error})") from error
        return described
    folder = Path(adapter)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"adapter {adapter}: has no {file}, expected a folder that PEFT's save_pretrained wrote (safetensors)"
            )
    # Not transformers' own `load_adapter`, which reads no magnitudes of DoRA.
    weights = {name.removeprefix(PREFIX): value for name, value in load_file(folder / ADAPTER_WEIGHTS).items()}
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        model.add_adapter(config)
        found = peft.set_peft_model_state_dict(model, weights)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"adapter {adapter}: does not fit {type(model).__name__} ({str(error)[:300]})") from error
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := sorted({*found.unexpected_keys, *own & set(found.missing_keys)}):
        raise ValueError(f"adapter {adapter}: is of another base than this {type(model).__name__}: {', '.join(wrong[:3])}")
    content: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return content | {TRAINED: True}


def has_peft(model: nn.Module) -> bool:
    """Whether adapters of PEFT are in a model of transformers."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def peft_disabled(model: nn.Module) -> Iterator[None]:
    """Switches the adapters of a `PretrainedLM` off meanwhile."""
    inner: Any = model.model
    inner.disable_adapters()
    try:
        yield
    finally:
        inner.enable_adapters()


def merge_peft(model: Any) -> None:
    """Merge the adapters into the weights, and take them out.

    Args:
        model: of transformers, changed in place.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
