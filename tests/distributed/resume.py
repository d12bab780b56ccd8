"""What one rank of a distributed test does: resume from checkpoints of several moments, and be stopped by a signal."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_align.training.interrupts import InterruptCheckpoint
from tests.distributed.train import STRATEGIES
from tests.training.places import Run, SaveAt, assert_goes_on


class Kill(Callback):
    """Sends SIGTERM to one of the ranks, in a forward pass after the first optimizer step."""

    sent = False

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 1 and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def options(**more: Any) -> dict[str, Any]:
    return {"devices": 2, "strategy": STRATEGIES[sys.argv[2]]("places"), "accumulate_grad_batches": 3, **more}


def main(folder: Path) -> None:
    whole = {}
    for method in ("sft", "dpo"):
        here = folder / method
        whole[method] = Run(method, here, **options())
        # Between the forward and the backward pass, torch cannot save weights that FSDP2 keeps gathered.
        within = "on_train_batch_start" if sys.argv[2] == "fsdp2" else "on_before_backward"
        save = SaveAt(here, [(within, 4), ("on_validation_batch_end", 0), ("on_train_batch_end", 3)])
        Run(method, here, save, **options())
        for moment, path in save.paths.items():
            assert_goes_on(whole[method], Run(method, here, ckpt_path=path, **options()), since=save.steps[moment])
    if sys.argv[2] == "fsdp2":
        torch.distributed.destroy_process_group()
        return
    longer = options(max_epochs=-1, max_steps=3)
    path = Run("sft", folder / "sft", **options(max_epochs=-1, max_steps=1)).save(folder / "after.ckpt")
    resumed = Run("sft", folder / "sft", ckpt_path=path, **longer)
    assert_goes_on(Run("sft", folder / "sft", **options(max_epochs=-1, max_steps=3)), resumed, since=1)

    stopped = InterruptCheckpoint()
    keep = ModelCheckpoint(folder / "kept", save_last=True, every_n_train_steps=99)
    try:
        Run("sft", folder / "sft", Kill(), keep, stopped, **options())
    except SystemExit as error:
        assert error.code == 143
    assert stopped.status == 143, "the rank was not stopped"
    resumed = Run("sft", folder / "sft", ckpt_path=folder / "kept" / "last.ckpt", **options())
    assert_goes_on(whole["sft"], resumed, since=1)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
