"""The callback that exports the model at the end of a fit."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_align.data.mixture import describe
from lightning_align.export.card import is_peft, model_card
from lightning_align.generation.ends import end_ids
from lightning_align.models.adapter_files import check_separable, expected_adapter_logits
from lightning_align.models.building import backbone_spec
from lightning_align.models.composed import FrozenParts, check_exportable, is_composed
from lightning_align.models.folders import check_folder
from lightning_align.models.formats import CONFIG, merged_weights, whole_weights, write_adapter, write_model
from lightning_align.models.language_model import policy_of
from lightning_align.models.peft_adapters import ADAPTER_CONFIG, check_mergeable
from lightning_align.models.proof import expected_logits


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
        """Check before training that the policy can be exported.

        Raises:
            ValueError: If `adapter_only` is set and no adapters train or they cannot be written alone, if the policy does not
                say how it is built, if the folder contains other files, or if the module has no `policy`.
        """
        policy = policy_of(pl_module)
        if self.adapter_only:
            if getattr(pl_module, "lora", None) is None and not is_peft(policy):
                raise ValueError(
                    "ExportModel: `adapter_only` is true, but no adapters train. Set `lora`, or remove `adapter_only`."
                )
            check_separable(policy)
        elif is_peft(policy):
            check_mergeable(policy)
        elif is_composed(policy):
            check_exportable(policy, self.frozen)
        elif backbone_spec(policy) is None:
            raise ValueError(
                "ExportModel: the policy must have `init_args`, from which it can be rebuilt, but is a "
                f"{type(policy).__name__} without them. Remove the callback and save its `state_dict()`, or give the class a "
                "dictionary `init_args`."
            )
        if self.folder is not None:
            check_folder(self.folder, ADAPTER_CONFIG if self.adapter_only else CONFIG)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the weights on every rank, and write them on one."""
        policy, lora = policy_of(pl_module), getattr(pl_module, "lora", None)
        scope = "default" if lora is None else lora.scope
        weights = whole_weights(policy)
        expected = expected_adapter_logits(policy, scope) if self.adapter_only else expected_logits(policy)
        # On every rank, because `log_dir` is a broadcast.
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "export")
        if not trainer.is_global_zero:
            return
        if self.adapter_only:
            write_adapter(policy, weights, folder, scope=scope, expected=expected)
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
                expected=expected,
                frozen=self.frozen,
                part_tokenizers=getattr(data, "augment_tokenizers", ()),
            )
            if getattr(data, "tokenizer", None) is None:
                rank_zero_info("exporting the model without a tokenizer, because the data module has none")
        rank_zero_info(f"exported the {'adapters' if self.adapter_only else 'model'} to {folder}")
