"""The command line with a callback that loses a rank: what torchrun starts, and starts again.

python elastic.py FOLDER FIT-ARGUMENTS
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_align import cli


class LoseOnce(Callback):
    """Kills rank 1 in the middle of the accumulation window after the third step, in the first of the starts."""

    def __init__(self, folder: str) -> None:
        self.mark = Path(folder) / "lost"

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    before = cli.AlignCLI.before_fit

    def losing(self: cli.AlignCLI) -> None:
        before(self)
        self.trainer.callbacks.insert(0, LoseOnce(sys.argv[1]))  # type: ignore[attr-defined]

    cli.AlignCLI.before_fit = losing  # type: ignore[method-assign]
    cli.run(sys.argv[2:])


if __name__ == "__main__":
    main()
