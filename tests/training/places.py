"""Runs of each method on rows from files, with checkpoints at chosen moments and a record of what each step trained."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from lightning_align.calm.datamodule import CALMDataModule
from lightning_align.calm.module import CALMModule
from lightning_align.calm.spec import Augment
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.references.update import ReferenceUpdate
from lightning_align.retro.datamodule import RETRODataModule
from lightning_align.retro.indexing import build_database
from lightning_align.retro.module import RETROModule
from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.sft.module import SFTModule
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.datamodule import SPINDataModule
from lightning_align.spin.module import SPINModule
from lightning_align.training.schedules import WarmupDecay
from tests.retro.toys import tiny_retro
from tests.toys import tiny_palm

METHODS = ("sft", "dpo", "spin", "calm", "retro")
ADAM = functools.partial(torch.optim.AdamW, lr=1e-2)
MODULE = {"optimizer": ADAM, "lr_scheduler": functools.partial(WarmupDecay, total_steps=20, warmup_steps=3)}
ROWS = 22
"""Eleven batches of two rows: with three micro-batches per step, the last step of an epoch has two."""


def write_rows(path: Path) -> str:
    if not path.exists():
        sums = [(i, i * i) for i in range(3, 3 + ROWS)]
        rows = [{"prompt": f"{a}+{b}=", "response": str(a + b), "chosen": str(a + b), "rejected": str(a)} for a, b in sums]
        names = ("prompt", "chosen", "rejected") if path.stem == "dpo" else ("prompt", "response")
        path.write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows))
    return str(path)


def build(method: str, folder: Path, **data: Any) -> tuple[Any, Any, list[Callback]]:
    """The module of a method, its data module, and the callbacks that it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(3, verbose=False)
    palm = functools.partial(tiny_palm, num_tokens=259, ff_dropout=0.0 if method == "dpo" else 0.2)
    if method == "retro":
        if not (folder / "db").exists():
            words = "fox dog cat sun moon quick brown lazy jumps sleeps over under red blue".split()
            for number in range(12):
                texts = folder / ("texts" if number < 8 else "queries")
                texts.mkdir(exist_ok=True)
                text = " ".join(random.Random(number).choices(words, k=16))
                (texts / f"{number}.txt").write_text(text)
            queries = {"validation": str(folder / "queries")}
            build_database(str(folder / "db"), str(folder / "texts"), queries=queries, encoder="bm25", chunk_size=8, k=2)
        model = tiny_retro(decoder=palm(depth=3), chunk_size=8)
        options = {"num_chunks": 2, "batch_size": 4, **data}
        rows = RETRODataModule(str(folder / "db"), validation="validation", **options)
        return RETROModule(model, **MODULE), rows, []
    path = write_rows(folder / ("dpo.jsonl" if method == "dpo" else "rows.jsonl"))
    options = {"validation": path, "batch_size": 2, "eval_batch_size": 11, "max_length": 24, "cache_dir": str(folder), **data}
    if method == "sft":
        return SFTModule(palm(), **MODULE), SFTDataModule(path, **options), []
    if method == "dpo":
        module = DPOModule(palm(), reference="moving", **MODULE)
        return module, DPODataModule(path, **options), [ReferenceUpdate(alpha=0.5, every=3)]
    if method == "calm":
        return (
            CALMModule(palm(), [Augment(tiny_palm(num_tokens=259, dim=8), every=1)], **MODULE),
            CALMDataModule(path, **options),
            [],
        )
    assert method == "spin"
    play = SelfPlayGeneration(iterations=2, epochs=1, folder=str(folder / "sets"))
    return (
        SPINModule(palm(), generation=GenerationConfig(max_new_tokens=4, seed=3), **MODULE),
        SPINDataModule(path, **options),
        [play],
    )


def rows_of(batch: Any) -> list[int]:
    """Numbers that identify the rows of a batch."""
    part = batch.get("chosen", batch.get("pairs", batch))
    return [hash(tuple(row)) for row in part["tokens"].tolist()]


class Record(Callback):
    """Keeps the rows of each optimizer step, by micro-batch, and the steps at which a validation ended."""

    def __init__(self) -> None:
        self.window: list[list[int]] = []
        self.steps: dict[int, list[list[int]]] = {}
        self.validated: list[int] = []
        self.epoch_ends: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.window.append(rows_of(batch))

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps[trainer.global_step], self.window = self.window, []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append(trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epoch_ends.append(trainer.global_step)


class SaveAt(Callback):
    """Saves a checkpoint at chosen calls of hooks, as (hook, number of the call from 0)."""

    def __init__(self, folder: Path, moments: list[tuple[str, int]]) -> None:
        self.paths = {moment: folder / f"{moment[0]}-{moment[1]}.ckpt" for moment in moments}
        self.steps: dict[tuple[str, int], int] = {}
        self.calls: dict[str, int] = {}
        for hook in {hook for hook, _ in moments}:
            setattr(self, hook, functools.partial(self._save, hook))

    def _save(self, hook: str, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        moment = (hook, self.calls.get(hook, 0))
        self.calls[hook] = moment[1] + 1
        if moment in self.paths:
            self.steps[moment] = trainer.global_step
            trainer.save_checkpoint(self.paths[moment])


class Run:
    """A fit, and what came of it."""

    def __init__(
        self, method: str, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, data: Any = None, **arguments: Any
    ) -> None:
        self.module, self.data, own = build(method, folder, **(data or {}))
        self.record = Record()
        if method == "spin":
            arguments["max_epochs"] = -1
        self.trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            default_root_dir=folder,
            callbacks=[*own, self.record, *callbacks],
            **{"max_epochs": 2, **arguments},
        )
        self.error: BaseException | None = None
        try:
            self.trainer.fit(self.module, self.data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        except RuntimeError as error:
            self.error = error

    def save(self, path: Path) -> Path:
        self.trainer.save_checkpoint(path)
        return path

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.module.policy.state_dict().items()}


def assert_goes_on(whole: Run, resumed: Run, *, since: int) -> None:
    """A run resumed after so many steps is the uninterrupted one: rows of each step, weights bit for bit, schedule.

    Args:
        whole: The uninterrupted run.
        resumed: The resumed run.
        since: The optimizer steps before the checkpoint.
    """
    assert resumed.error is None
    assert resumed.record.steps == {step: rows for step, rows in whole.record.steps.items() if step >= since}
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert resumed.trainer.current_epoch == whole.trainer.current_epoch
    mine, others = resumed.weights, whole.weights
    assert mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in others)
    schedules = [run.trainer.lr_scheduler_configs[0].scheduler.state_dict() for run in (whole, resumed)]
    assert schedules[0] == schedules[1]
    # A validation at the step of the checkpoint runs again only if it had not ended.
    assert resumed.record.validated in [
        [step for step in whole.record.validated if step >= least] for least in (since, since + 1)
    ]
