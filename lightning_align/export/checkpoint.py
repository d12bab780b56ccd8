"""Export of the policy in a checkpoint."""

from pathlib import Path
from typing import Any

from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.export.card import is_peft, model_card
from lightning_align.generation.ends import end_ids
from lightning_align.models.checkpoint import SHARDS_META, build_policy, gather_checkpoint, read_checkpoint
from lightning_align.models.formats import whole_weights, write_adapter, write_model
from lightning_align.models.lora import LoRAConfig


def export_checkpoint(
    checkpoint: str, *, output: str, tokenizer: str | None = None, adapter_only: bool = False, max_shard_size: str = "5GB"
) -> None:
    """Write the policy of a checkpoint as a folder that transformers, PEFT or this package can load.

    Args:
        checkpoint: The checkpoint of a run: a file, or a folder of a sharded strategy.
        output: The folder to write to.
        tokenizer: The tokenizer to write beside the model, as in the data module.
        adapter_only: Write only the LoRA adapters, in PEFT's format.
        max_shard_size: The largest size of a file of weights.

    Raises:
        ValueError: If there is no such checkpoint, or it cannot be written in this format.
    """
    saved = gather_checkpoint(checkpoint) if (Path(checkpoint) / SHARDS_META).is_file() else read_checkpoint(checkpoint)
    hparams: dict[str, Any] = dict(saved.get("hyper_parameters") or {})
    policy = build_policy(saved, checkpoint, merge=not adapter_only)
    lora = hparams.get("lora")
    if adapter_only and not lora and not is_peft(policy):
        raise ValueError(f"checkpoint {checkpoint} has no adapters, so --adapter_only cannot write any. Remove --adapter_only.")
    weights = whole_weights(policy)
    if adapter_only:
        write_adapter(policy, weights, output, scope=LoRAConfig(**dict(lora)).scope if lora else "default")
    else:
        reader = None if tokenizer is None else load_tokenizer(tokenizer)
        card = model_card(policy, str(hparams.get("_class_path", "")).rpartition(".")[2], hparams, {}, {})
        given = dict(hparams.get("generation") or {}).get("eos_token")
        # A text is no id without a tokenizer, and `write_model` then keeps what the model declares.
        eos_token = given if reader is not None or not isinstance(given, str) else None
        eos_ids = end_ids(tokenizer=reader, model=policy, eos_token=eos_token)
        write_model(policy, weights, output, tokenizer=reader, eos_ids=eos_ids, card=card, max_shard_size=max_shard_size)
    print(f"exported the model to {output}")
