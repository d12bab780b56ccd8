"""The model card of an exported folder."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_align.models.peft_adapters import has_peft
from lightning_align.models.pretrained import PretrainedLM

SHOWN = ("loss", "beta", "reference", "opponent", "lora", "sft_weight", "label_smoothing", "init_from")


def is_peft(policy: nn.Module) -> bool:
    """Return whether a policy is a transformers model with PEFT adapters."""
    return isinstance(policy, PretrainedLM) and has_peft(policy.model)


def model_card(
    policy: nn.Module, method: str, hparams: Mapping[str, Any], sources: Mapping[str, str], metrics: Mapping[str, float]
) -> str:
    """Write a model card: the method, its hyperparameters, the data, the metrics, and code that loads the model.

    Args:
        policy: The trained model.
        method: The class name of the module.
        hparams: The module's hyperparameters.
        sources: The sources of the ``train`` and ``validation`` rows.
        metrics: The last logged values.
    """
    backbone = hparams.get("backbone")
    base = backbone.get("init_args", {}).get("name") if isinstance(backbone, Mapping) else None
    versions = {name: importlib.metadata.version(name) for name in ("lightning-align", "torch", "lightning")}
    of_transformers = isinstance(policy, PretrainedLM)
    lines = ["---", f"library_name: {'transformers' if of_transformers else 'lightning-align'}", "tags: [lightning-align]"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["---", "", f"# A model trained with {method or 'lightning-align'}", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | `{hparams[name]}` |" for name in SHOWN if hparams.get(name) is not None]
    lines += [f"| {name} data | `{sources[name]}` |" for name in ("train", "validation") if sources.get(name) is not None]
    lines += [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items()) if name.startswith(("val/", "train/loss"))]
    lines += [f"| {name} | {version} |" for name, version in versions.items()]
    lines += ["", "```python"]
    if of_transformers:
        lines += ["from transformers import AutoModelForCausalLM", "", "model = AutoModelForCausalLM.from_pretrained(folder)"]
    else:
        lines += ["from lightning_align.models.formats import read_model", "", "model = read_model(folder)"]
    lines += ["```"]
    return "\n".join(lines) + "\n"
