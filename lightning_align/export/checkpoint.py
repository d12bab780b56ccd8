"""Export from a checkpoint."""

from pathlib import Path
from typing import Any

from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.export.card import is_peft, model_card
from lightning_align.models.checkpoint import SHARDS_META, build_policy, gather_checkpoint, read_checkpoint
from lightning_align.models.formats import whole_weights, write_adapter, write_model
from lightning_align.models.lora import LoRAConfig


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
    if adapter_only and not lora and not is_peft(policy):
        raise ValueError(f"checkpoint {checkpoint}: holds no adapters, which --adapter_only is to write")
    weights = whole_weights(policy)
    if adapter_only:
        write_adapter(policy, weights, output, scope=LoRAConfig(**dict(lora)).scope if lora else "default")
    else:
        reader = None if tokenizer is None else load_tokenizer(tokenizer)
        card = model_card(policy, str(hparams.get("_class_path", "")).rpartition(".")[2], hparams, {}, {})
        write_model(policy, weights, output, tokenizer=reader, card=card, max_shard_size=max_shard_size)
    print(f"the model is in {output}")
