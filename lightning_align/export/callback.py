"""The callback that exports the model at the end of a fit."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_align.data.mixture import describe
from lightning_align.export.card import is_peft, model_card
from lightning_align.models.formats import merged_weights, whole_weights, write_adapter, write_model
from lightning_align.models.language_model import policy_of


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
        if self.adapter_only and getattr(pl_module, "lora", None) is None and not is_peft(policy):
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
            sources = {name: describe(source) for name, source in given.items()}
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
