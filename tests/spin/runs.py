"""Self-play runs for several tests: a tiny model, ten demonstrations, three iterations."""

import functools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_align.generation.sampler import GenerationConfig
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.datamodule import SPINDataModule
from lightning_align.spin.generations import GeneratedSet
from lightning_align.spin.module import SPINModule
from tests.toys import tiny_palm

ROWS = 10
ADAM = functools.partial(torch.optim.AdamW, lr=1e-2)
GENERATION = GenerationConfig(max_new_tokens=5, batch_size=4, seed=3)


class Interrupted(RuntimeError):
    """Simulates the end of the process."""


class InterruptAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.steps:
            raise Interrupted


def exact_palm() -> Any:
    """Build a tiny PaLM in float64, for tests that compare samples from batches of different shapes.

    Different shapes use different kernels, which round differently. Of a few hundred draws over 259 tokens, one is within about
    1e-6 of another token. This is the rounding error of float32, so in float32 rounding could change the draw.
    """
    return tiny_palm(num_tokens=259, dtype=torch.float64)


def write_rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"{i}{'+' * (i % 3)}1=", "response": str(i + 1)} for i in range(ROWS)]
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def start(folder: Path, *callbacks: Callback, loop: dict[str, Any] | None = None, **module: Any) -> tuple[L.Trainer, Any, Any]:
    """Build a trainer, a module and its data. Sets go to ``folder / "sets"``, and each step overwrites ``last.ckpt``."""
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(0, verbose=False)
    rows = write_rows(folder)
    arguments = {"optimizer": ADAM, "generation": GENERATION, **module}
    defaults = {"iterations": 3, "epochs": [1, 2, 1], "replay": 1, "folder": str(folder / "sets")}
    play = SelfPlayGeneration(**{**defaults, **(loop or {})})
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[play, *callbacks, checkpoints],
        num_sanity_val_steps=0,
    )
    data = SPINDataModule(rows, validation=rows, batch_size=4, max_length=16, cache_dir=str(folder / "cache"))
    backbone = arguments.pop("backbone", None) or tiny_palm(num_tokens=259)
    return trainer, SPINModule(backbone, **arguments), data


def finish(folder: Path, *callbacks: Callback, resume: bool = False, **options: Any) -> tuple[L.Trainer, Any]:
    trainer, module, data = start(folder, *callbacks, **options)
    trainer.fit(module, data, ckpt_path=folder / "last.ckpt" if resume else None)
    return trainer, module


def set_rows(folder: Path, iteration: int, stage: str = "train") -> list[dict[str, Any]]:
    parts = sorted((folder / "sets" / f"iteration_{iteration}" / stage).glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


class Noise(Callback):
    """Rounds like another machine: each step ends with a relative error of this size."""

    def __init__(self, size: float = 1e-7) -> None:
        self.size = size

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        generator = torch.Generator().manual_seed(trainer.global_step)
        with torch.no_grad():
            for weight in pl_module.policy.parameters():
                weight.mul_(1 + self.size * torch.randn(weight.shape, generator=generator))


def interrupt_writes(monkeypatch: pytest.MonkeyPatch, number: int) -> list[Path]:
    """Interrupt the run when it writes a part after this many. Returns the parts that were written, also later ones."""
    written: list[Path] = []
    write = GeneratedSet.write

    def counted(self: GeneratedSet, part: int, rows: Any) -> None:
        if len(written) == number:
            written.append(Path("interrupted"))
            raise Interrupted
        written.append(self.path(part))
        write(self, part, rows)

    monkeypatch.setattr(GeneratedSet, "write", counted)
    return written


class Keep(Callback):
    """Saves a checkpoint after step 2, within iteration 0."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "within.ckpt"

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
