"""PEFT adapters in models of transformers: all kinds that PEFT injects into layers, such as DoRA. Needs the extra `hf`."""

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
"""The key that PEFT sets in the configuration of adapters that it saved. Without it, a configuration is for new adapters."""
PREFIX = "base_model.model."
"""The prefix of the weight names in PEFT's adapter files, before the names of the model's layers."""


def add_peft(model: Any, adapter: str | dict[str, Any]) -> dict[str, Any]:
    """Add PEFT adapters to a model of transformers. Afterwards only the adapters are trainable.

    Args:
        model: A model of transformers. It is changed in place.
        adapter: A folder that PEFT's ``save_pretrained`` wrote, or the configuration of new adapters: the arguments of the
            configuration class of PEFT, with ``peft_type`` if it is not LORA.

    Returns:
        The configuration, in a form that can be saved in a checkpoint.

    Raises:
        ValueError: If the adapters cannot be created or read, or do not fit the model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("PretrainedLM: `adapter` needs PEFT. Install it: pip install -c constraints.txt -e '.[cpu,hf]'")
    import peft

    if isinstance(adapter, dict):
        described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **adapter}
        try:
            config = peft.get_peft_config(dict(described))
            config.inference_mode = False  # a configuration of trained adapters, as in a checkpoint, has True
            model.add_adapter(config)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"PretrainedLM: `adapter` must be a configuration of PEFT, but {adapter} is not valid ({error})."
            ) from error
        return described
    folder = Path(adapter)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"adapter {adapter} must contain {file}, but does not. Pass a folder that PEFT's save_pretrained wrote "
                "(safetensors)."
            )
    # Not `load_adapter` of transformers, which does not load the magnitudes of DoRA.
    weights = {name.removeprefix(PREFIX): value for name, value in load_file(folder / ADAPTER_WEIGHTS).items()}
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        model.add_adapter(config)
        found = peft.set_peft_model_state_dict(model, weights)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"adapter {adapter} does not fit {type(model).__name__} ({str(error)[:300]}). Pass the base model that the "
            "adapters were trained on."
        ) from error
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := sorted({*found.unexpected_keys, *own & set(found.missing_keys)}):
        raise ValueError(
            f"adapter {adapter} is of another base model than this {type(model).__name__}. Only one of them has the weights "
            f"{', '.join(wrong[:3])}. Pass the base model that the adapters were trained on."
        )
    content: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return content | {TRAINED: True}


def has_peft(model: nn.Module) -> bool:
    """Return whether a model of transformers has PEFT adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def peft_disabled(model: nn.Module) -> Iterator[None]:
    """Switch the PEFT adapters of a `PretrainedLM` off within a ``with`` block."""
    inner: Any = model.model
    inner.disable_adapters()
    try:
        yield
    finally:
        inner.enable_adapters()


def merge_peft(model: Any) -> None:
    """Merge the PEFT adapters into the weights, and remove them.

    Args:
        model: A model of transformers. It is changed in place.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
