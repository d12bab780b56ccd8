"""Trains in a child process that its parent kills at random, again and again, until one child comes to the end.

    python tests/killed.py FOLDER KILLS

The uninterrupted run stands in FOLDER/whole.pt, the other in FOLDER/killed.pt.
"""

import functools
import json
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.references.update import ReferenceUpdate
from lightning_align.training.schedules import WarmupDecay
from tests.toys import tiny_palm

STEPS = 36
HANGS = 400


class Seen(Callback):
    """Keeps which rows each optimizer step saw, and the loss of each micro-batch, in the checkpoint."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.parent = os.getppid()
        self.rows: list[list[int]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch["chosen"]["rows"].tolist())
        self.losses.append(float(outputs["loss"]))
        while trainer.global_step >= self.most and os.getppid() == self.parent:
            time.sleep(0.05)  # until it is killed: on a fast machine too, no child that is to be killed comes to the end

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.losses = state_dict["rows"], state_dict["losses"]


def checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step=*.ckpt") if zipfile.is_zipfile(path)]
    return sorted(found, key=lambda path: int(path.stem.partition("=")[2]))


def train(folder: Path, rows: str, output: Path, most: int) -> None:
    """Go on from the last checkpoint to the end, and write everything that there is; wait to be killed after `most` steps."""
    L.seed_everything(3, verbose=False)
    module = DPOModule(
        tiny_palm(num_tokens=259, ff_dropout=0.2),
        reference="moving",
        sft_weight=0.3,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=functools.partial(WarmupDecay, total_steps=STEPS, warmup_steps=4),
    )
    data = DPODataModule(rows, validation=rows, batch_size=2, max_length=32, cache_dir=str(folder))
    seen = Seen(most)
    keep = ModelCheckpoint(folder / "run", filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        check_val_every_n_epoch=2,
        default_root_dir=folder,
        callbacks=[ReferenceUpdate(alpha=0.3, every=3), seen, keep],
    )
    found = checkpoints(folder / "run")
    trainer.fit(module, data, ckpt_path=found[-1] if found else None, weights_only=True)
    (values,) = trainer.validate(module, data, verbose=False)
    state = {
        "module": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "metrics": values,
        "seen": seen.state_dict(),
        "steps": trainer.global_step,
    }
    torch.save(state, output.with_suffix(".tmp"))
    os.replace(output.with_suffix(".tmp"), output)


def child(
    folder: Path,
    rows: str,
    output: Path,
    *,
    most: int = STEPS + 1,
    kill: Callable[[float, bool], bool] = lambda age, moved: False,
) -> bool:
    """Train in a fork; whether it came to the end.

    Args:
        folder: of its checkpoints.
        rows: what to train on.
        output: for its result.
        most: number of optimizer steps of the whole run after which it waits to be killed.
        kill: whether to kill it, from its age in seconds and whether it has written a checkpoint.
    """
    before = checkpoints(folder / "run")[-1:]
    process = os.fork()
    if process == 0:
        try:
            train(folder, rows, output, most)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    begin = time.monotonic()
    while (age := time.monotonic() - begin) < HANGS:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the training failed"
            return True
        if kill(age, checkpoints(folder / "run")[-1:] != before):
            break
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert age < HANGS, "the training hangs"
    return False


def main(folder: Path, kills: int) -> None:
    rows = folder / "rows.jsonl"
    pairs = [{"prompt": f"{i}+{i * i}=", "chosen": str(i + i * i), "rejected": str(i)} for i in range(3, 25)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    begin = time.monotonic()
    assert child(folder / "a", str(rows), folder / "whole.pt")
    whole = time.monotonic() - begin
    chance, at = random.Random(kills), []
    for number in range(kills):
        # Most are killed some time after their first checkpoint, so that there is progress; the others at any time.
        early, wait, since = number % 5 == 3, chance.uniform(0, whole / kills / 2), [0.0]

        def kill(age: float, moved: bool, early: bool = early, wait: float = wait, since: list[float] = since) -> bool:
            if moved and not since[0]:
                since[0] = age
            return age > wait * 4 if early else moved and age - since[0] > wait

        most = (number + 1) * STEPS // (kills + 1)
        assert not child(folder / "b", str(rows), folder / "killed.pt", most=most, kill=kill)
        at += [path.stem for path in checkpoints(folder / "b" / "run")[-1:]]
    assert child(folder / "b", str(rows), folder / "killed.pt")
    print("the last checkpoint at each kill:", ", ".join(at))


if __name__ == "__main__":
    for name in ("a", "b"):
        (Path(sys.argv[1]) / name).mkdir(exist_ok=True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
