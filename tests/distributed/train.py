"""What one rank of a distributed test does: train a method under a strategy, and write what came of it."""

import functools
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule
from lightning_align.dpo.monitor import PreferenceMonitor
from lightning_align.export.callback import ExportModel
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.references.update import ReferenceUpdate
from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.sft.module import SFTModule
from tests.data.helpers import write_jsonl
from tests.toys import preference_batch, split, tiny_palm, token_batch

SFT_BATCH = token_batch([2, 1, 3, 2, 1, 2, 3, 1], [9, 8, 1, 7, 1, 1, 2, 1])
DPO_BATCH = preference_batch(8)
for side in (DPO_BATCH["chosen"], DPO_BATCH["rejected"]):
    side["rows"] = torch.arange(8)
# Responses of 1 to 18 characters, of which several are packed into one sequence.
ROWS = [{"prompt": "p" * (1 + i % 4), "response": chr(97 + i % 26) * (1 + i * i % 19)} for i in range(40)]
# With momentum: Lightning cannot restore an optimizer without state under FSDP2.
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def build(case: str, folder: Path) -> Any:
    """The module of a case, and its eight rows or its data module."""
    if case == "sft":
        return SFTModule(tiny_palm(), optimizer=SGD), SFT_BATCH
    if case == "packed":
        rows = write_jsonl(folder / f"rows-{os.getpid()}.jsonl", ROWS)
        options = {"packing": True, "packed_length": 48, "max_length": 32, "cache_dir": str(folder / "cache")}
        few = write_jsonl(folder / f"few-{os.getpid()}.jsonl", ROWS[:5])
        return SFTModule(tiny_palm(num_tokens=259), optimizer=SGD), SFTDataModule(
            rows, validation={"all": rows, "few": few}, **options
        )
    if case == "dpo":
        return DPOModule(tiny_palm(tie_embeddings=False), sft_weight=0.3, optimizer=SGD), DPO_BATCH
    if case == "moving":
        return DPOModule(tiny_palm(), reference="moving", optimizer=SGD), DPO_BATCH
    if case == "stored":
        cache = str(folder / "cache")
        return DPOModule(tiny_palm(), reference="stored", reference_cache=cache, ld_alpha=0.5, optimizer=SGD), DPO_BATCH
    base = folder / "base.pt"
    if case == "moving_lora":
        lora = LoRAConfig(rank=2)
        return DPOModule(tiny_palm, init_from=str(base), reference="moving", lora=lora, optimizer=SGD), DPO_BATCH
    if case == "pretrained":
        return DPOModule(PretrainedLM(str(folder / "llama")), optimizer=SGD), DPO_BATCH
    if case == "peft":
        return DPOModule(PretrainedLM(str(folder / "llama"), adapter={"r": 2, "use_dora": True}), optimizer=SGD), DPO_BATCH
    assert case == "lora"
    return DPOModule(tiny_palm, init_from=str(base), lora=LoRAConfig(rank=2), optimizer=SGD), DPO_BATCH


class Gradients(Callback):
    """Keeps the whole gradients of the last optimizer step."""

    whole: dict[str, Tensor]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.keep(pl_module)

    def keep(self, module: Any) -> None:
        found = {name: weight.grad for name, weight in module.policy.named_parameters() if weight.grad is not None}
        if found:
            self.whole = {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in found.items()}


def checkpoint_of(case: str, folder: Path, devices: int) -> Path:
    """Where the first epoch's checkpoint stands that so many ranks wrote."""
    return folder / f"{case}-{devices}.ckpt"


def full(model: nn.Module) -> dict[str, Tensor]:
    """All weights on one rank; a collective where they are sharded."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def run(
    case: str,
    strategy: Any,
    devices: int,
    folder: Path,
    *,
    resumed: bool = False,
    opened: Path | None = None,
    copies: int = 1,
    saved: Path | None = None,
) -> dict[str, Any]:
    """Train two epochs of one optimizer step each; the rows of a rank are its part of the eight.

    Args:
        case: one of `CASES`.
        strategy: from the case; a fresh one for each Trainer.
        devices: number of ranks.
        folder: for checkpoints.
        resumed: stop after the first epoch, and go on from the checkpoint with a new module.
        opened: a checkpoint of the first epoch, to begin at.
        copies: number of ranks that have the same rows.
        saved: where to save a checkpoint by hand after the run, which is ended by steps; then one epoch is trained.
    """

    found = Gradients()

    def trainer(epochs: int) -> L.Trainer:
        callbacks: list[Callback] = [found, *([ReferenceUpdate(alpha=0.3, every=1)] if case.startswith("moving") else [])]
        if case in ("dpo", "moving_lora"):
            callbacks.append(PreferenceMonitor(num_prompts=3, max_new_tokens=5))
        return L.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy(case),
            max_epochs=epochs,
            num_sanity_val_steps=1 if epochs == 2 else 0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            gradient_clip_val=1.0,
            accumulate_grad_batches=2,
            default_root_dir=folder,
            callbacks=callbacks,
        )

    L.seed_everything(0, verbose=False)
    module, batch = build(case, folder)
    whole_run = trainer(1 if resumed or saved else 2)
    # Two micro-batches an optimizer step, whose tokens differ between ranks and between micro-batches.
    if isinstance(batch, L.LightningDataModule):
        batch.batch_size = batch.eval_batch_size = 4 * copies // devices
        data: dict[str, Any] = {"datamodule": batch}
    else:
        shares = devices // copies
        parts = split(batch, 4 // shares)[whole_run.global_rank // copies :: shares]
        loader: DataLoader[Any] = DataLoader(parts, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
        data = {"train_dataloaders": loader, "val_dataloaders": loader}
    whole_run.fit(module, **data, ckpt_path=opened)
    if saved is not None:
        whole_run.save_checkpoint(saved)
    if resumed:
        path = checkpoint_of(case, folder, devices)
        whole_run.save_checkpoint(path)
        module, _ = build(case, folder)
        whole_run = trainer(2)
        whole_run.fit(module, **data, ckpt_path=path)
    metrics = {n: float(v) for n, v in whole_run.callback_metrics.items() if n.startswith(("val/", "train/grad"))}
    state = full(module.policy)  # this leaves the weights sharded, as the first generation of a run finds them
    config = GenerationConfig(max_new_tokens=12, temperature=0)
    # Rank 1 ends its rows at another step than rank 0, and both must go on until all have ended.
    prompts = [[1, 2, 3], [4]][: 1 + whole_run.global_rank // copies]
    texts = [r[0].tokens for r in generate(module.policy, prompts, config, eos_id=5)]
    result = {"state": state, "metrics": metrics, "texts": texts, "gradients": found.whole}
    if case.startswith("moving"):
        result["average"] = full(module.reference_average)
        result["sharded"] = all(isinstance(p, DTensor) for p in module.reference_average.parameters())
    if case in ("dpo", "pretrained", "dpo_palm", "dpo_qwen3"):
        reference = module.reference.model
        result["reference"] = full(reference)
        result["sharded"] = all(isinstance(p, DTensor) for p in reference.parameters())
    return result


def measure(size: int, strategy: Any, devices: int, folder: Path) -> dict[str, float]:
    """Validate five pairs, in batches of a size: three of them on rank 0 and two on rank 1, or all on one."""
    batch = preference_batch(5)
    for side in (batch["chosen"], batch["rejected"]):
        side["rows"] = torch.arange(5)
    module = DPOModule(tiny_palm(), beta=2.0)
    module.configure_model()
    module.policy.load_state_dict(tiny_palm(seed=1).state_dict())
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy("dpo"),
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[PreferenceMonitor(num_prompts=3, max_new_tokens=5)],
    )
    own = [split(batch, 3), [batch]][devices == 1][trainer.global_rank]
    loader: DataLoader[Any] = DataLoader(split(own, size), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    (values,) = trainer.validate(module, loader, verbose=False)
    return dict(values)


def export(strategy: Any, devices: int, folder: Path) -> dict[str, Tensor]:
    """Train a step and export the policy into the run's folder, whose name the ranks learn from the first; the weights."""
    module = SFTModule(tiny_palm(), optimizer=SGD)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy("sft"),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[ExportModel()],
    )
    trainer.fit(module, DataLoader([SFT_BATCH], batch_size=None))  # type: ignore[arg-type]
    return full(module.policy)


CASES = ("sft", "packed", "dpo", "pretrained", "lora", "peft", "stored", "moving", "moving_lora")
RESUMED = ("dpo", "pretrained", "lora", "peft", "moving", "moving_lora")
LIMIT = timedelta(seconds=300)
STRATEGIES: dict[str, Any] = {
    "ddp": lambda case: DDPStrategy(process_group_backend="gloo", timeout=LIMIT),
    "fsdp2": lambda case: ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=case not in ("lora", "peft", "moving_lora"),  # both kinds of checkpoint
        process_group_backend="gloo",
        timeout=LIMIT,
    ),
}


def main(folder: Path) -> None:
    warnings.filterwarnings("error", message=".*sync_dist")
    for name, strategy in STRATEGIES.items():
        here = folder / name
        results: dict[Any, Any] = {(case, False): run(case, strategy, 2, here) for case in CASES}
        results |= {(case, True): run(case, strategy, 2, here, resumed=True) for case in RESUMED}
        results |= {(case, "other"): run(case, strategy, 2, here, opened=checkpoint_of(case, here, 1)) for case in RESUMED}
        results["exported", False] = export(strategy, 2, here)
        if name == "ddp":
            results["five pairs"] = [measure(size, strategy, 2, here) for size in range(1, 6)]
        torch.save(results, here / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
