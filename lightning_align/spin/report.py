"""What self-play shows of an iteration: statistics as numbers, and the first responses as a table."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L

from lightning_align.training.markdown import cell, table
from lightning_align.training.panels import show_table
from lightning_align.training.tensorboard import META

SHOWN = 4
"""The number of prompts per iteration that loggers show."""
COLUMNS = ("prompt", "real", "generated")


def log_iteration(
    trainer: L.Trainer,
    module: Any,
    played: dict[str, dict[str, float]],
    *,
    iteration: int,
    folder: Path,
    speed: float | None,
) -> None:
    """Log the statistics of an iteration, and show its first responses as a table. Every rank must call this.

    Args:
        trainer: The trainer.
        module: The module, which logs.
        played: The statistics of each stage.
        iteration: The iteration.
        folder: The folder of the iteration.
        speed: The generated tokens per second of this rank, or None if nothing was generated.
    """
    numbers = {f"{stage}/{name}": value for stage, values in played.items() for name, value in values.items()}
    numbers["iteration"] = float(iteration)
    if speed is not None:
        numbers["generation_tokens_per_second"] = speed * trainer.world_size
    for name, value in numbers.items():
        counts = name.rpartition("/")[2] in ("iteration", "generated", "generation_tokens_per_second")
        module.log(f"{META if counts else ''}spin/{name}", value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
    if not trainer.is_global_zero or not played:
        return
    stage = "validation" if "validation" in played else "train"
    with (folder / stage / "part-00000.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, SHOWN)]
    cells = [[row["prompt"], row["real"], row["generated"][0]["text"]] for row in rows]
    markdown = {"spin/generations": table(COLUMNS, [[cell(text) for text in each] for each in cells])}
    show_table(trainer.loggers, "spin/generations", COLUMNS, cells, step=iteration, markdown=markdown)
