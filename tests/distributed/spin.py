"""What one rank of a self-play test does: two iterations under a strategy, and what came of them."""

import functools
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_align.models import weights
from lightning_align.models.weights import state_hash
from tests.distributed.train import STRATEGIES, full
from tests.distributed.waits import forbid_long_waits
from tests.spin.runs import exact_palm, start

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def run(folder: Path, rows: str, strategy: Any, devices: int, *, opponent: str, resumed: bool = False) -> dict[str, Any]:
    """Play and return the weights; the sets are in the folder.

    Args:
        folder: of the sets, too.
        rows: file of demonstrations.
        strategy: makes one, fresh for each Trainer.
        devices: number of ranks.
        opponent: see `SPINModule`.
        resumed: stop after two steps, and go on from the checkpoint with a new module.
    """
    place = folder / f"rank_{os.environ.get('RANK', '0')}"

    def prepared(*callbacks: Callback, max_steps: int = -1) -> tuple[L.Trainer, Any, Any]:
        loop = {"iterations": 2, "epochs": 1}
        template, module, data = start(place, optimizer=SGD, loop=loop, opponent=opponent, ema_decay=0.7, backbone=exact_palm())
        play = template.callbacks[0]  # type: ignore[attr-defined]
        play.folder = folder / "sets"
        data.sources = {"train": rows, "validation": rows}
        data.cache_dir = str(folder / "cache")
        data.batch_size = 4 // devices
        trainer = L.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy(),
            logger=False,
            max_epochs=-1,
            max_steps=max_steps,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            default_root_dir=folder,
            callbacks=[play, *callbacks],
            num_sanity_val_steps=0,
        )
        return trainer, module, data

    path = None
    if resumed:
        trainer, module, data = prepared(ModelCheckpoint(folder, "two", every_n_train_steps=2), max_steps=2)
        trainer.fit(module, data)
        path = folder / "two.ckpt"
    trainer, module, data = prepared()
    trainer.fit(module, data, ckpt_path=path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    moving = module.opponent.moving
    return {"state": full(module.policy), "metrics": metrics, "average": {} if moving is None else full(moving.average)}


def main(name: str, opponent: str, folder: Path, rows: str) -> None:
    forbid_long_waits()
    hashed: list[int] = []

    def counted(state: dict[str, torch.Tensor]) -> str:
        hashed.append(len(state))
        return state_hash(state)

    with mock.patch("lightning_align.spin.boundary.state_hash", counted), mock.patch.object(weights, "state_hash", counted):
        result = run(folder, rows, lambda: STRATEGIES[name]("spin"), 2, opponent=opponent, resumed=opponent == "ema")
    result["hashed"] = len(hashed)
    torch.save(result, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
