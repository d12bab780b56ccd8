"""What one rank of a test of changing ranks does: go on with a run of each method for some steps, and save by hand."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from tests.distributed.train import STRATEGIES
from tests.retro.toys import tiny_retro
from tests.toys import tiny_palm
from tests.training import places
from tests.training.places import Run

PHASES = (("auto", 1), ("ddp", 3), ("fsdp2", 4), ("auto", 5), ("fsdp2", 7), ("ddp", 8))
"""The strategy of each part of the run, and the optimizer step at which it ends. An epoch has four steps."""


def checkpoint(folder: Path, method: str, phase: int) -> Path:
    return folder / f"{method}-{phase}.ckpt"


def go_on(method: str, folder: Path, phase: int | None = None, *, until: int = 0) -> Run:
    """Train a phase of the run and save its checkpoint, or train so many steps in one process."""
    # Without dropout, because a rank draws other numbers than one process. In float64, so that rounding changes no sample of
    # SPIN, and because the gradient of this RETRO multiplies rounding by a hundred.
    wide: dict[str, Any] = {"dtype": torch.float64} if method in ("spin", "retro") else {}
    palm = mock.patch.object(places, "tiny_palm", lambda **given: tiny_palm(**{**given, **wide, "ff_dropout": 0.0}))
    retro = mock.patch.object(places, "tiny_retro", lambda **given: tiny_retro(**given, **wide))
    strategy, steps = ("auto", until) if phase is None else PHASES[phase]
    ranks = 1 if strategy == "auto" else 2
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": -1, "max_steps": steps, "devices": ranks}
    if ranks == 2:
        options["strategy"] = STRATEGIES[strategy]("lora")  # saves a file, which every strategy reads
    size = 4 if method == "retro" else 2
    found = None if not phase else checkpoint(folder, method, phase - 1)
    with palm, retro:  # and no longer, because other tests of this process make models too
        run = Run(method, folder / method, ckpt_path=found, data={"batch_size": size // ranks}, **options)
    assert run.error is None, run.error
    assert run.trainer.global_step == steps
    if phase is not None:
        run.save(checkpoint(folder, method, phase))
    return run


def whole(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in run.weights.items()}


def main(folder: Path, phases: list[int], methods: list[str]) -> None:
    for method in methods:
        for phase in phases:
            state = whole(go_on(method, folder, phase))
        if torch.distributed.get_rank() == 0:
            torch.save(state, folder / f"{method}-{phases[-1]}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(phase) for phase in sys.argv[2].split(",")], sys.argv[3:])
