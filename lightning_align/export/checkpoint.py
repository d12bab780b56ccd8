"""Export of the policy in a checkpoint."""

from pathlib import Path
from typing import Any

from lightning_align.data.tokenizer.record import KEY
from lightning_align.export.card import is_peft, model_card
from lightning_align.export.facts import metrics_of_checkpoint, run_of_checkpoint, sources_of_checkpoint
from lightning_align.export.tokenizer import NONE, folder_tokenizer, part_tokenizers, tokenizer_of
from lightning_align.export.usage import AdapterUse
from lightning_align.generation.ends import end_ids
from lightning_align.models.checkpoint import build_policy, gather_checkpoint, read_checkpoint
from lightning_align.models.composed import FrozenParts
from lightning_align.models.formats import CONFIG, read_model, whole_weights, write_adapter, write_model
from lightning_align.models.integrity import SHARDS_META
from lightning_align.models.lora import LoRAConfig


def export_checkpoint(
    checkpoint: str,
    *,
    output: str,
    tokenizer: str | None = None,
    force_tokenizer: bool = False,
    adapter_only: bool = False,
    max_shard_size: str = "5GB",
    frozen: FrozenParts = "whole",
) -> None:
    """Write the policy of a checkpoint as a folder that transformers, PEFT or this package can load.

    Args:
        checkpoint: The checkpoint of a run: a file, or a folder of a sharded strategy. Or an exported folder.
        output: The folder to write to.
        tokenizer: The tokenizer to write beside the model, as in the data module. It must be the tokenizer of the run. Default
            is the tokenizer that the checkpoint names; beside adapters alone, none. `none` writes no tokenizer.
        force_tokenizer: Write `tokenizer` even if it is not the tokenizer of the run.
        adapter_only: Write only the LoRA adapters, in PEFT's format.
        max_shard_size: The largest size of a file of weights.
        frozen: For a composition (CALM): with `whole`, the folder contains the frozen models. With `references`, it has their
            paths or names and the hashes of their weights.

    Raises:
        ValueError: If there is no such checkpoint, it cannot be written in this format, or its tokenizer is not found.
    """
    saved: dict[str, Any] = {}
    if (Path(checkpoint) / CONFIG).is_file():
        policy = read_model(checkpoint)
        tokenizer = tokenizer or folder_tokenizer(checkpoint)
    else:
        saved = gather_checkpoint(checkpoint) if (Path(checkpoint) / SHARDS_META).is_file() else read_checkpoint(checkpoint)
        policy = build_policy(saved, checkpoint, merge=not adapter_only)
    hparams: dict[str, Any] = dict(saved.get("hyper_parameters") or {})
    lora = hparams.get("lora")
    if adapter_only and not lora and not is_peft(policy):
        raise ValueError(f"checkpoint {checkpoint} has no adapters, so --adapter_only cannot write any. Remove --adapter_only.")
    record = saved.get(KEY)
    given = NONE if adapter_only and tokenizer is None else tokenizer
    reader = tokenizer_of(checkpoint, record, given=given, force=force_tokenizer)
    weights = whole_weights(policy)

    def card(adapter: AdapterUse | None) -> str:
        return model_card(
            policy,
            str(hparams.get("_class_path", "")).rpartition(".")[2],
            hparams,
            sources_of_checkpoint(checkpoint),
            metrics_of_checkpoint(saved),
            settings=run_of_checkpoint(saved),
            tokenizer=reader,
            adapter=adapter,
        )

    if adapter_only:
        scope, start = LoRAConfig(**dict(lora)).scope if lora else "default", hparams.get("init_from")
        write_adapter(
            policy,
            weights,
            output,
            scope=scope,
            tokenizer=reader,
            card=lambda base: card(AdapterUse(base, start, output)),
        )
    else:
        eos_token = dict(hparams.get("generation") or {}).get("eos_token")
        # A text is no id without a tokenizer, and `write_model` then keeps what the model declares.
        eos_token = eos_token if reader is not None or not isinstance(eos_token, str) else None
        eos_ids = end_ids(tokenizer=reader, model=policy, eos_token=eos_token)
        write_model(
            policy,
            weights,
            output,
            tokenizer=reader,
            eos_ids=eos_ids,
            card=card(None),
            max_shard_size=max_shard_size,
            frozen=frozen,
            part_tokenizers=part_tokenizers(checkpoint, saved),
        )
    print(f"exported the {'adapters' if adapter_only else 'model'} to {output}")
    if reader is None and given is None:
        print("without a tokenizer, because the checkpoint names none. Give --tokenizer to write one.")
