"""What one rank of a self-play test does: two iterations under a strategy, and what came of them."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tests.distributed.train import STRATEGIES, full
from tests.spin.runs import start

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def run(folder: Path, rows: str, strategy: Any, devices: int, **module_options: Any) -> dict[str, Any]:
    """Play and return the weights; the sets are in the folder."""
    loop = {"iterations": 2, "epochs": 1}
    place = folder / f"rank_{os.environ.get('RANK', '0')}"
    template, module, data = start(place, optimizer=SGD, loop=loop, **module_options)
    play = template.callbacks[0]  # type: ignore[attr-defined]
    play.folder = folder / "sets"
    data.sources = {"train": rows, "validation": rows}
    data.cache_dir = str(folder / "cache")
    data.batch_size = 4 // devices
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[play],
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {"state": full(module.policy), "metrics": metrics}


def main(name: str, opponent: str, folder: Path, rows: str) -> None:
    torch.set_num_threads(1)
    result = run(folder, rows, STRATEGIES[name]("spin"), 2, opponent=opponent)
    torch.save(result, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
