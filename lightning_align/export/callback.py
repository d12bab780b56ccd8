"""The callback that exports the model at the end of a fit."""

import os
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_align.export.card import is_peft, model_card
from lightning_align.export.facts import describe_run, describe_sources, final_metrics, method_of
from lightning_align.export.usage import AdapterUse
from lightning_align.generation.ends import end_ids
from lightning_align.models.adapter_files import check_separable, expected_adapter_logits
from lightning_align.models.composed import FrozenParts, check_exportable, is_composed
from lightning_align.models.folders import check_folder, check_writable, write_tokenizer
from lightning_align.models.formats import CONFIG, merged_weights, whole_weights, write_adapter, write_model
from lightning_align.models.language_model import policy_of
from lightning_align.models.peft_adapters import ADAPTER_CONFIG, check_mergeable
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.proof import expected_logits
from lightning_align.models.rehearsal import check_formats, check_rebuildable, export_bytes
from lightning_align.runtime.run_folder import run_folder
from lightning_align.runtime.team import of_first_rank


class ExportModel(Callback):
    """Exports the policy at the end of training, with tokenizer and model card. Adapters are merged, or exported alone."""

    def __init__(
        self,
        folder: str | None = None,
        *,
        adapter_only: bool = False,
        max_shard_size: str = "5GB",
        frozen: FrozenParts = "whole",
    ) -> None:
        """Set the folder and the format.

        Args:
            folder: The folder. Default is `export` in the run's folder.
            adapter_only: Write only the LoRA adapters, in PEFT's format, instead of a model with the adapters merged.
            max_shard_size: The largest size of a file of weights, for a `PretrainedLM`.
            frozen: For a composition (CALM): with `whole`, the folder contains the frozen models. With `references`, it has
                their paths or names and the hashes of their weights.
        """
        self.folder, self.adapter_only, self.max_shard_size = folder, adapter_only, max_shard_size
        self.frozen: FrozenParts = frozen

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before training that the policy can be exported: what the end of the run would refuse is refused now.

        Raises:
            ValueError: If `adapter_only` is set and no adapters train or they cannot be written alone, if the policy cannot be
                rebuilt from its `init_args` or is quantized, if the folder contains other files or cannot be written, if the
                tokenizer cannot be saved, or if the module has no `policy`.
        """
        policy = policy_of(pl_module)
        if self.adapter_only:
            if getattr(pl_module, "lora", None) is None and not is_peft(policy):
                raise ValueError(
                    "ExportModel: `adapter_only` is true, but no adapters train. Set `lora`, or remove `adapter_only`."
                )
            check_separable(policy)
        elif is_composed(policy):
            check_exportable(policy, self.frozen)
        else:
            check_formats(policy, max_shard_size=self.max_shard_size)
            check_rebuildable(policy)
            if is_peft(policy):
                check_mergeable(policy)
        folder = self.place(trainer)
        self._card(trainer, pl_module, policy, folder)
        self._end_ids(trainer, pl_module, policy)
        fault = self._folder_fault(trainer, policy, folder) if trainer.is_global_zero else None
        if fault := of_first_rank(fault):  # on every rank, because only one has tried to write
            raise ValueError(fault)

    def _folder_fault(self, trainer: L.Trainer, policy: nn.Module, folder: Path) -> str | None:
        try:
            check_folder(folder, ADAPTER_CONFIG if self.adapter_only else CONFIG)
            check_not_base(policy, folder)
            check_writable(folder, export_bytes(policy, adapter_only=self.adapter_only))
            if not self.adapter_only:
                with tempfile.TemporaryDirectory() as temporary:
                    write_tokenizer(self._tokenizer(trainer), Path(temporary))
        except OSError as error:
            return (
                f"`folder` must be a folder that can be written, but {folder} is not ({error.strerror or error}). Pass another."
            )
        except ValueError as error:
            return str(error)
        return None

    def place(self, trainer: L.Trainer) -> Path:
        """Return the folder of the export. All ranks must call this, because `log_dir` is a broadcast."""
        return Path(self.folder or run_folder(trainer) / "export")

    def _tokenizer(self, trainer: L.Trainer) -> Any:
        return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)

    def _end_ids(self, trainer: L.Trainer, pl_module: L.LightningModule, policy: nn.Module) -> tuple[int, ...]:
        eos_token = getattr(getattr(pl_module, "generation", None), "eos_token", None)
        return end_ids(tokenizer=self._tokenizer(trainer), model=policy, eos_token=eos_token)

    def _card(
        self, trainer: L.Trainer, pl_module: L.LightningModule, policy: nn.Module, folder: Path, base: str | None = None
    ) -> str:
        hparams = dict(pl_module.hparams)
        return model_card(
            policy,
            method_of(pl_module),
            hparams,
            describe_sources(getattr(trainer, "datamodule", None)),
            final_metrics(trainer),
            settings=describe_run(trainer),
            tokenizer=None if self.adapter_only else self._tokenizer(trainer),
            adapter=AdapterUse(base, hparams.get("init_from"), folder) if self.adapter_only else None,
        )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the weights on every rank, and write them on one."""
        policy, lora = policy_of(pl_module), getattr(pl_module, "lora", None)
        scope = "default" if lora is None else lora.scope
        weights = whole_weights(policy)
        expected = expected_adapter_logits(policy, scope) if self.adapter_only else expected_logits(policy)
        folder = self.place(trainer)
        if not trainer.is_global_zero:
            return
        if self.adapter_only:
            write_adapter(
                policy,
                weights,
                folder,
                scope=scope,
                card=lambda base: self._card(trainer, pl_module, policy, folder, base),
                expected=expected,
            )
        else:
            tokenizer = self._tokenizer(trainer)
            write_model(
                policy,
                merged_weights(policy, weights),
                folder,
                tokenizer=tokenizer,
                eos_ids=self._end_ids(trainer, pl_module, policy),
                card=self._card(trainer, pl_module, policy, folder),
                max_shard_size=self.max_shard_size,
                expected=expected,
                frozen=self.frozen,
                part_tokenizers=getattr(getattr(trainer, "datamodule", None), "augment_tokenizers", ()),
            )
            if tokenizer is None:
                rank_zero_info("exporting the model without a tokenizer, because the data module has none")
        rank_zero_info(f"exported the {'adapters' if self.adapter_only else 'model'} to {folder}")


def check_not_base(policy: nn.Module, folder: Path) -> None:
    """Check that an export would not replace the model that the run began with.

    Args:
        policy: The policy.
        folder: The folder of the export.

    Raises:
        ValueError: If the folder is that of a base model.
    """
    for part in policy.modules():
        base = part.init_args["name"] if isinstance(part, PretrainedLM) else None
        if base is not None and folder.is_dir() and Path(base).is_dir() and os.path.samefile(base, folder):
            raise ValueError(
                f"`folder` must not be the model that the run begins with, but got {folder}, which the export would replace. "
                "Pass another path."
            )
