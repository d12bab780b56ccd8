"""What one rank of the retrieval test does: a fit whose callback builds the database first."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_align.models.building import backbone_spec
from lightning_align.retrieval import chunks, encoders, neighbors
from lightning_align.retrieval.stages import Arrays, Stage
from lightning_align.retro.callbacks import RetrievalIndexing
from lightning_align.sft.module import SFTModule
from tests.retrieval.helpers import Listed, texts
from tests.toys import tiny_palm, token_batch


def checkpoint(path: Path) -> str:
    """A model that encodes bytes, as a file."""
    model = tiny_palm(num_tokens=259)
    state = {f"policy.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"backbone": backbone_spec(model)}}, path)
    return str(path)


def small_blocks() -> None:
    """Many blocks, so that each rank has some."""
    chunks.BLOCK_BYTES, encoders.BLOCK_CHUNKS, neighbors.BLOCK_CHUNKS = 800, 64, 64


def fit(folder: Path, encoder: str, *, strategy: Any, devices: int) -> None:
    """Train one step, with the database in the folder."""
    small_blocks()
    batch = token_batch([2, 1], [3, 4])
    indexing = RetrievalIndexing(
        str(folder),
        documents=Listed(texts(40)),
        queries={"validation": Listed(texts(4, seed=5, prefix="v"))},
        encoder=encoder,
        tokenizer="bytes",
        chunk_size=32,
        k=3,
        verify=0.2,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[indexing],
    )
    loader: DataLoader[Any] = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    trainer.fit(SFTModule(tiny_palm()), loader, loader)


def watch_blocks(root: Path, lost: str) -> None:
    """Note each block of vectors that is published, and have the lost rank die at its second one."""
    real, published = Stage.write_block, 0

    def write_block(self: Stage, number: int, arrays: Arrays) -> None:
        nonlocal published
        if self.name == "vectors":
            if os.environ["LOCAL_RANK"] == lost and published == 1:
                while len(list(self.folder.glob("blocks/*/*.npz"))) < torch.distributed.get_world_size():
                    time.sleep(0.05)  # until each rank has published one, so that there is something to resume
                (root / "lost").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            with (root / "published").open("a") as file:
                file.write(f"{self.folder.name}/{number}\n")
            published += 1
        real(self, number, arrays)

    Stage.write_block = write_block  # type: ignore[method-assign]


if __name__ == "__main__":
    root, ranks, lost = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if lost != "nobody watched":
        watch_blocks(root, lost)
    fit(root / "ranks", str(root / "encoder.ckpt"), strategy=DDPStrategy(timeout=timedelta(seconds=300)), devices=ranks)
    torch.distributed.destroy_process_group()
