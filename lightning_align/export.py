"""The way out: a folder that transformers and vLLM read, written when a run ends or from a checkpoint."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.models.checkpoint import SHARDS_META, build_policy, gather_checkpoint, read_checkpoint
from lightning_align.models.formats import merged_weights, whole_weights, write_adapter, write_model
from lightning_align.models.language_model import policy_of
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.peft_adapters import has_peft
from lightning_align.models.pretrained import PretrainedLM

SHOWN = ("loss", "beta", "reference", "opponent", "lora", "sft_weight", "label_smoothing", "init_from")


class ExportModel(Callback):
    """Writes the policy when training ends: with its tokenizer and a model card, adapters merged into it or alone."""

    def __init__(self, folder: str | None = None, *, adapter_only: bool = False, max_shard_size: str = "5GB") -> None:
        """Choose where and what.

        Args:
            folder: by default `export` in the run's folder.
            adapter_only: write LoRA adapters as PEFT does, in place of a model with them merged in.
            max_shard_size: of a file of weights of a `PretrainedLM`.
        """
        self.folder, self.adapter_only, self.max_shard_size = folder, adapter_only, max_shard_size

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be written before anything is trained.

        Raises:
            ValueError: if adapters are to be written and none train, or the module has no `policy`.
        """
        policy = policy_of(pl_module)
        if self.adapter_only and getattr(pl_module, "lora", None) is None and not _of_peft(policy):
            raise ValueError(
                "ExportModel: adapter_only is true, but no adapters train: give the module `lora`, or leave it out"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the weights, on every rank, and write them, on one."""
        policy, lora = policy_of(pl_module), getattr(pl_module, "lora", None)
        weights = whole_weights(policy)
        # On every rank too: the run's folder is told to all of them by the first.
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "export")
        if not trainer.is_global_zero:
            return
        if self.adapter_only:
            write_adapter(policy, weights, folder, scope="default" if lora is None else lora.scope)
        else:
            data: Any = getattr(trainer, "datamodule", None)
            given = getattr(data, "sources", {})
            sources = {name: x if isinstance(x, str) else type(x).__name__ for name, x in given.items()}
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            write_model(
                policy,
                merged_weights(policy, weights),
                folder,
                tokenizer=getattr(data, "tokenizer", None),
                card=model_card(policy, type(pl_module).__name__, dict(pl_module.hparams), sources, metrics),
                max_shard_size=self.max_shard_size,
            )
        rank_zero_info(f"the model is in {folder}")


def export_checkpoint(
    checkpoint: str, *, output: str, tokenizer: str | None = None, adapter_only: bool = False, max_shard_size: str = "5GB"
) -> None:
    """Write the policy of a checkpoint as a folder that others read.

    Args:
        checkpoint: file, or folder of a sharded strategy, that a run wrote.
        output: folder to write to.
        tokenizer: as in the data module; written beside the model.
        adapter_only: write the LoRA adapters alone, as PEFT does.
        max_shard_size: of a file of weights.

    Raises:
        ValueError: if there is no such checkpoint, or it cannot be written in this form.
    """
    saved = gather_checkpoint(checkpoint) if (Path(checkpoint) / SHARDS_META).is_file() else read_checkpoint(checkpoint)
    hparams: dict[str, Any] = dict(saved.get("hyper_parameters") or {})
    policy = build_policy(saved, checkpoint, merge=not adapter_only)
    lora = hparams.get("lora")
    if adapter_only and not lora and not _of_peft(policy):
        raise ValueError(f"checkpoint {checkpoint}: holds no adapters, which --adapter_only is to write")
    weights = whole_weights(policy)
    if adapter_only:
        write_adapter(policy, weights, output, scope=LoRAConfig(**dict(lora)).scope if lora else "default")
    else:
        reader = None if tokenizer is None else load_tokenizer(tokenizer)
        card = model_card(policy, str(hparams.get("_class_path", "")).rpartition(".")[2], hparams, {}, {})
        write_model(policy, weights, output, tokenizer=reader, card=card, max_shard_size=max_shard_size)
    print(f"the model is in {output}")


def _of_peft(policy: nn.Module) -> bool:
    return isinstance(policy, PretrainedLM) and has_peft(policy.model)


def model_card(
    policy: nn.Module, method: str, hparams: Mapping[str, Any], sources: Mapping[str, str], metrics: Mapping[str, float]
) -> str:
    """A model card: what was trained, how, on what, to which result, and what reads it.

    Args:
        policy: what was trained.
        method: name of the module.
        hparams: its hyperparameters.
        sources: where the rows of ``train`` and ``validation`` came from.
        metrics: the last values of what was logged.
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
