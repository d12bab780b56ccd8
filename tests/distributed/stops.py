"""What one rank of a distributed test does: signals come to some ranks, and the run goes on exactly.

python stops.py FOLDER STRATEGY METHODS CASES

The lists are separated by commas. A case is a signal and the ranks that get it: ``SIGUSR1-0+1`` is sent to both ranks.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors import signal_connector

from lightning_align.training.interrupts import InterruptCheckpoint
from tests.distributed.train import STRATEGIES
from tests.training.places import Run, assert_goes_on

REQUEUE = signal.SIGUSR1


class Send(Callback):
    """Sends a signal to chosen ranks in the accumulation window after the first step, to each in another micro-batch."""

    def __init__(self, number: int, ranks: list[int]) -> None:
        self.number, self.ranks, self.sent = number, ranks, False

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        rank, place = trainer.global_rank, trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches
        if trainer.global_step == 1 and rank in self.ranks and place == rank and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


def arguments(number: int) -> dict[str, Any]:
    found: dict[str, Any] = {"devices": 2, "strategy": STRATEGIES[sys.argv[2]]("places"), "accumulate_grad_batches": 3}
    if sys.argv[3] == "retro":
        found["accumulate_grad_batches"] = 2
    return found | ({"plugins": [SLURMEnvironment(auto_requeue=True)]} if number == REQUEUE else {})


def stop(method: str, here: Path, number: int, ranks: list[int]) -> Path | None:
    """Train until the signal has its effect, and return the checkpoint that has to be named to a run that goes on."""
    send, stopped = Send(number, ranks), InterruptCheckpoint()
    if number == REQUEUE:
        run = Run(method, here, send, **arguments(number))
        assert run.error is None, run.error
        assert send.sent == (run.trainer.global_rank in ranks)
        assert run.trainer.is_global_zero is (os.environ["RANK"] == "0")
        found = sorted(path.name for path in here.glob("hpc_ckpt_*"))
        assert found == ["hpc_ckpt_1.ckpt"], f"one checkpoint for one signal: {found}"
        return None  # Lightning finds it by itself
    keep = ModelCheckpoint(here / "kept", save_last=True, every_n_train_steps=99)
    try:
        Run(method, here, send, keep, stopped, **arguments(number))
    except SystemExit as error:
        assert error.code == 128 + number == stopped.status, error.code
    else:
        raise AssertionError("the run was not stopped")
    return here / "kept" / "last.ckpt"


def main(folder: Path, methods: list[str], cases: list[str]) -> None:
    rank = os.environ["RANK"]
    slurm = {
        "JOB_ID": "1",
        "JOB_NAME": "job",
        "NTASKS": "2",
        "NTASKS_PER_NODE": "2",
        "NODEID": "0",
        "PROCID": rank,
        "LOCALID": rank,
    }
    os.environ.update({f"SLURM_{name}": value for name, value in slurm.items()})
    untyped: Any = signal_connector
    untyped.call = lambda _: 0  # scontrol
    for method in methods:
        whole = Run(method, folder / method / "whole", **arguments(0))
        for case in cases:
            name, _, ranks = case.partition("-")
            number, here = signal.Signals[name], folder / method / case
            path = stop(method, here, number, [int(rank) for rank in ranks.split("+")])
            resumed = Run(method, here, ckpt_path=path, **arguments(number))
            assert_goes_on(whole, resumed, since=1)
            torch.distributed.barrier()
            if rank == "0":
                shutil.rmtree(here)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3].split(","), sys.argv[4].split(","))
