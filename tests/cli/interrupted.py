"""Runs the command line in a process, with a callback that sends the process a signal at a certain step.

python -m tests.cli.interrupted SIGNAL WHERE ARGUMENTS...

WHERE is `step`, `group`, `validation`, or `scoring=N` and `generating=N` for the N-th batch or part.
"""

import os
import signal
import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_align import cli
from lightning_align.references.stored import StoredLogProbs
from lightning_align.spin.generations import GeneratedSet


class Kill(Callback):
    """Sends the signal in step 4: in a forward pass or in the first validation after it."""

    def __init__(self, name: str, where: str) -> None:
        self.number, self.where, self.sent = getattr(signal, name), where, False

    def _send(self, where: str, trainer: L.Trainer) -> None:
        if not self.sent and where == self.where and trainer.global_step >= 4:
            self.sent = True
            # As a terminal does it: also to the workers of the data loader.
            (os.killpg if "group" in where else os.kill)(os.getpid(), self.number)

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._send("step", trainer)
        self._send("group", trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._send("validation", trainer)


def send_at_call(function: Any, number: int, name: str) -> Any:
    """Return a function that sends a signal to this process after a number of calls, once."""
    calls = 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        result = function(*args, **options)
        calls += 1
        if calls == number:
            os.kill(os.getpid(), getattr(signal, name))
        return result

    return called


def main(name: str, where: str, arguments: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if where == "group":
        os.setsid()
    place, _, number = where.partition("=")
    if place == "scoring":
        StoredLogProbs._keep = send_at_call(StoredLogProbs._keep, int(number), name)  # type: ignore[method-assign]
    if place == "generating":
        GeneratedSet.write = send_at_call(GeneratedSet.write, int(number), name)  # type: ignore[method-assign]
    before = cli.AlignCLI.before_fit

    def with_signal(self: cli.AlignCLI) -> None:
        before(self)
        if name != "none":
            self.trainer.callbacks.insert(0, Kill(name, where))  # type: ignore[attr-defined]

    cli.AlignCLI.before_fit = with_signal  # type: ignore[method-assign]
    cli.run(arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
