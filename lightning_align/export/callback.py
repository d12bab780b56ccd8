"""The callback that exports the model at the end of a fit."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_align.data.mixture import describe
from lightning_align.export.card import is_peft, model_card
from lightning_align.generation.ends import end_ids
from lightning_align.models.formats import merged_weights, whole_weights, write_adapter, write_model
from lightning_align.models.language_model import policy_of


class ExportModel(Callback):
    """Exports the policy at the end of training, with tokenizer and model card. Adapters are merged, or exported alone."""

    def __init__(self, folder: str | None = None, *, adapter_only: bool = False, max_shard_size: str = "5GB") -> None:
        """Set the folder and the format.

        Args:
            folder: The folder. Default is `export` in the run's folder.
            adapter_only: Write only the LoRA adapters, in PEFT's format, instead of a model with the adapters merged.
            max_shard_size: The largest size of a file of weights, for a `PretrainedLM`.
        """
        self.folder, self.adapter_only, self.max_shard_size = folder, adapter_only, max_shard_size

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before training that the policy can be exported.

        Raises:
            ValueError: If `adapter_only` is set and no adapters train, or the module has no `policy`.
        """
        policy = policy_of(pl_module)
        if self.adapter_only and getattr(pl_module, "lora", None) is None and not is_peft(policy):
            raise ValueError(
                "ExportModel: `adapter_only` is true, but no adapters train. Set `lora`, or remove `adapter_only`."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the weights on every rank, and write them on one."""
        policy, lora = policy_of(pl_module), getattr(pl_module, "lora", None)
        weights = whole_weights(policy)
        # On every rank, because `log_dir` is a broadcast.
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "export")
        if not trainer.is_global_zero:
            return
        if self.adapter_only:
            write_adapter(policy, weights, folder, scope="default" if lora is None else lora.scope)
        else:
            data: Any = getattr(trainer, "datamodule", None)
            tokenizer = getattr(data, "tokenizer", None)
            eos_token = getattr(getattr(pl_module, "generation", None), "eos_token", None)
            given = getattr(data, "sources", {})
            sources = {name: describe(source) for name, source in given.items()}
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            write_model(
                policy,
                merged_weights(policy, weights),
                folder,
                tokenizer=tokenizer,
                eos_ids=end_ids(tokenizer=tokenizer, model=policy, eos_token=eos_token),
                card=model_card(policy, type(pl_module).__name__, dict(pl_module.hparams), sources, metrics),
                max_shard_size=self.max_shard_size,
            )
        rank_zero_info(f"exported the model to {folder}")
