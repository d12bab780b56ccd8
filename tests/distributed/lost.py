"""What one rank of a test of lost ranks does: it is lost in the middle of something, or the other one is.

    python lost.py FOLDER STRATEGY MOMENT HOW

The rank that is lost is ``LOST`` of the environment, 1 by default. Where the other one does not wait for it in a collective of
gloo, which a closed socket ends, it waits in a sleep, as it would in a collective of NCCL.
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_align.references.stored import StoredLogProbs
from lightning_align.retrieval import chunks
from lightning_align.retrieval.stages import Stage
from lightning_align.retro.callbacks import RetrievalIndexing
from lightning_align.runtime import rank_link
from lightning_align.sft.module import SFTModule
from lightning_align.spin.generations import GeneratedSet
from lightning_align.training.watch import RankWatch
from tests.distributed.train import STRATEGIES
from tests.distributed.train import build as case_of
from tests.retrieval.helpers import Listed, texts
from tests.spin.runs import exact_palm, start
from tests.toys import split, tiny_palm

FOREVER = 1000.0


def is_lost() -> bool:
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return rank == os.environ.get("LOST", "1")


def lose(how: str) -> None:
    """Die, fail as with a full disk, or wait for the one that does so."""
    if not is_lost():
        time.sleep(FOREVER)
    time.sleep(0.5)
    (Path(sys.argv[1]) / "lost").touch()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, "No space left on device")


class Lose(Callback):
    """Loses a rank in the second step, and has one that fails hang before it ends, as in a collective."""

    def __init__(self, moment: str, how: str) -> None:
        self.moment, self.how = moment, how

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if self.moment == "training" and trainer.global_step == 1:
            lose(self.how)

    def on_exception(self, *_: Any) -> None:
        if is_lost():
            time.sleep(FOREVER)


class Loader(DataLoader[Any]):
    """Yields the batches in worker processes, which hold copies of all open sockets."""


class Data(L.LightningDataModule):
    """Only rank 0 prepares data, and the other one waits for it without a limit."""

    def __init__(self, loader: Loader, how: str) -> None:
        super().__init__()
        self.loader, self.how = loader, how

    def prepare_data(self) -> None:
        if self.how:
            lose(self.how)

    def train_dataloader(self) -> Loader:
        return self.loader


class Own(L.LightningModule):
    """A module of somebody else, which asks for the watch as the README says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def configure_callbacks(self) -> list[Callback]:
        RankWatch.attach(self.trainer)
        return []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(3, 2)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lost_in(owner: Any, name: str, how: str) -> None:
    """Lose the rank where it calls a function. The other one does not call it, or goes on."""
    real = getattr(owner, name)

    def losing(*args: Any, **kwargs: Any) -> Any:
        return lose(how) if is_lost() else real(*args, **kwargs)

    setattr(owner, name, losing)


def trainer_of(folder: Path, strategy: str, *callbacks: Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy]("dpo"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


def main(folder: Path, strategy: str, moment: str, how: str) -> None:
    rank_link.GRACE = 3.0
    hang = Lose(moment, how)
    if moment == "generation":
        lost_in(GeneratedSet, "write", how)
        template, module, data = start(folder, loop={"iterations": 1, "epochs": 1}, backbone=exact_palm())
        play = template.callbacks[0]  # type: ignore[attr-defined]
        trainer_of(folder, strategy, play, hang, max_epochs=-1).fit(module, data)
        return
    if moment == "indexing":
        chunks.BLOCK_BYTES = 800  # several blocks, so that each rank has some
        lost_in(Stage, "write_block", how)
        indexing = RetrievalIndexing(
            str(folder / "db"), documents=Listed(texts(40)), encoder="bm25", tokenizer="bytes", chunk_size=32, k=3
        )
        trainer_of(folder, strategy, indexing, hang, max_steps=1).fit(SFTModule(tiny_palm()), Loader([], batch_size=None))
        return
    if moment == "own_module":
        hang.moment = "training"
        trainer_of(folder, strategy, hang, max_steps=3).fit(Own(), DataLoader(range(8), batch_size=2))  # type: ignore[arg-type]
        return
    if moment == "scoring":
        lost_in(StoredLogProbs, "_keep", how)
    module, batch = case_of("stored" if moment == "scoring" else "sft", folder)
    parts: Any = split(batch, 2)
    # Workers of a data loader are forks, which hold copies of all open sockets.
    workers: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"} if moment == "training" else {}
    loader = Loader(parts * 4, batch_size=None, **workers)
    data = Data(loader, how if moment == "prepare" else "")
    trainer_of(folder, strategy, hang, max_steps=3).fit(module, data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5])
    torch.distributed.destroy_process_group()
