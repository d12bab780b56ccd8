"""The model card of an exported folder."""

import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lightning_align.export.papers import METHODS, papers_of
from lightning_align.export.usage import AdapterUse, is_local, usage
from lightning_align.models.peft_adapters import has_peft
from lightning_align.models.pretrained import PretrainedLM

SHOWN = (
    *("loss", "loss_args", "beta", "label_smoothing", "sft_weight", "divergence", "divergence_alpha", "confidence_weighting"),
    *("ld_alpha", "reference", "opponent", "ema_decay", "base_weight", "generate", "dropout", "router_aux_loss_coef"),
    *("combine", "connection", "num_neighbors", "init_from", "lora"),
)
"""The hyperparameters of the modules that a card shows."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HIDDEN = ("train/lr", "train/grad_norm")


def is_peft(policy: nn.Module) -> bool:
    """Return whether a policy is a transformers model with PEFT adapters."""
    return isinstance(policy, PretrainedLM) and has_peft(policy.model)


def model_card(
    policy: nn.Module,
    method: str,
    hparams: Mapping[str, Any],
    sources: Mapping[str, str],
    metrics: Mapping[str, float],
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    adapter: AdapterUse | None = None,
) -> str:
    """Write a model card: base model, method, data, hyperparameters, metrics, and code that loads the model.

    The metadata at its beginning are those that the Hugging Face hub reads. Paths of this machine are shortened.

    Args:
        policy: The trained model.
        method: The class name of the module.
        hparams: The module's hyperparameters.
        sources: The sources of the ``train`` and ``validation`` rows, with the counts of their rows.
        metrics: The last logged values.
        settings: Further settings of the run, by name, such as the learning rate.
        tokenizer: The tokenizer that is written beside the model, if any.
        adapter: How to find the base model, if only adapters are written.
    """
    base = base_name(policy, hparams)
    trained = trained_adapters(policy, hparams)
    title, _ = METHODS.get(method, (method or "lightning-align", None))
    lines = ["---", yaml.safe_dump(_metadata(policy, method, base, adapter), sort_keys=False).strip(), "---", ""]
    lines += [f"# {'Adapters' if adapter is not None else 'A model'} trained with {method or 'lightning-align'}", ""]
    rows: list[tuple[str, Any]] = [("method", title)]
    rows += [("paper", f"{name}: https://arxiv.org/abs/{number}") for name, number in papers_of(method, hparams, trained)]
    rows += [("base model", shortened(base))] if base is not None else []
    rows += [(f"{name} data", value) for name, value in sources.items()]
    lines += [*_table("run", rows), ""]
    shown = {name: hparams[name] for name in SHOWN if hparams.get(name) is not None}
    if is_peft(policy):
        shown["adapter"] = {name: value for name, value in trained.items() if value not in (None, {}, [], False)}
    versions = {name: importlib.metadata.version(name) for name in ("lightning-align", "torch", "lightning")}
    lines += [*_table("setting", [*shown.items(), *(settings or {}).items(), *versions.items()], code=True), ""]
    kept = {name: value for name, value in metrics.items() if name.startswith(("val/", "train/")) and name not in HIDDEN}
    if kept:
        lines += [*_table("at the end", [(name, f"{value:.4g}") for name, value in sorted(kept.items())]), ""]
    return "\n".join([*lines, *usage(policy, tokenizer=tokenizer, adapter=adapter)]) + "\n"


def base_name(policy: nn.Module, hparams: Mapping[str, Any]) -> str | None:
    """Return the folder or hub name of the model that a run began with, or None if it began with random weights."""
    if isinstance(policy, PretrainedLM) and policy.init_args["name"] is not None:
        return str(policy.init_args["name"])
    start = hparams.get("init_from")
    return None if start is None else str(start)


def trained_adapters(policy: nn.Module, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the adapters that a run trained, or an empty dictionary."""
    if is_peft(policy):
        return dict(policy.init_args["adapter"])  # type: ignore[index]
    return dict(hparams.get("lora") or {})


def shortened(value: Any) -> str:
    """Return a value as text. An absolute path within the working directory is relative, and another one is its name."""
    text = str(value)
    if not os.path.isabs(os.path.expanduser(text)):
        return text
    path = Path(text)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) and path != Path.cwd() else path.name


def _table(head: str, rows: list[tuple[str, Any]], *, code: bool = False) -> list[str]:
    lines = [f"| {head} | |", "|---|---|"]
    for name, value in rows:
        text = shortened(value).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {f'`{text}`' if code else text} |")
    return lines


def _metadata(policy: nn.Module, method: str, base: str | None, adapter: AdapterUse | None) -> dict[str, Any]:
    """Return the metadata of the card. The hub rejects a base model that is not a name on the hub."""
    of_transformers = isinstance(policy, PretrainedLM)
    library = "lightning-align" if not of_transformers else "transformers" if adapter is None else "peft"
    composite = isinstance(policy, PretrainedLM) and policy.composite
    known: dict[str, Any] = {} if base is None else _inherited(base)
    found: dict[str, Any] = {"library_name": library}
    if base is not None and not is_local(base) and HUB_NAME.fullmatch(base):
        found["base_model"] = base
    elif "base_model" in known:
        found["base_model"] = known["base_model"]
    if "base_model" in found:
        found["base_model_relation"] = "finetune" if adapter is None else "adapter"
    found |= {name: known[name] for name in ("license", "license_name", "license_link", "language") if name in known}
    found["pipeline_tag"] = "image-text-to-text" if composite else "text-generation"
    found["tags"] = ["lightning-align", *([method.removesuffix("Module").lower()] if method in METHODS else [])]
    found["tags"] += ["lora"] if adapter is not None else []
    return found


def _inherited(base: str) -> dict[str, Any]:
    """Return the metadata of the base model's own card, if it is on this machine."""
    card: Path | None = Path(base) / "README.md"
    if not is_local(base):
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return {}
        cached = try_to_load_from_cache(base, "README.md") if HUB_NAME.fullmatch(base) else None
        card = Path(cached) if isinstance(cached, str) else None
    try:
        text = "" if card is None else card.read_text(encoding="utf-8")
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        content = yaml.safe_load(match[1]) if match else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
