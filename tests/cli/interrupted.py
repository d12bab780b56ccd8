"""Runs the command line in processes that send themselves a signal.

Started as a script, it forks a process for each line that it reads, so that they share its imports. A process of the tests
cannot be forked: torch refuses a backward pass in the fork of a process that has made one on another device.

The place is `step`, `group`, `validation`, the command `validate` or `predict`, or `scoring=N` and `generating=N` for the N-th
batch or part.
"""

import json
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

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
        if self.where == "validate":
            os.kill(os.getpid(), self.number)

    def on_predict_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.where == "predict":
            os.kill(os.getpid(), self.number)


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


def forked(name: str, where: str, arguments: list[str], output: Path) -> NoReturn:
    """Be a process of its own in a fork: what it prints goes to a file, and it ends as Python does."""
    code = 1
    file = output.open("w", buffering=1)
    try:
        os.setsid()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        for logger in (logging.getLogger(log) for log in ("lightning", "lightning.pytorch", "lightning.fabric")):
            for handler in logger.handlers:
                if type(handler) is logging.StreamHandler:  # not those of pytest
                    handler.setStream(file)
        main(name, where, arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        print("" if isinstance(end.code, int) else end.code, file=file)
    except BaseException:
        traceback.print_exc(file=file)
    finally:
        file.flush()
        os._exit(code)


def main(name: str, where: str, arguments: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    place, _, number = where.partition("=")
    if place == "scoring":
        StoredLogProbs._keep = send_at_call(StoredLogProbs._keep, int(number), name)  # type: ignore[method-assign]
    if place == "generating":
        GeneratedSet.write = send_at_call(GeneratedSet.write, int(number), name)  # type: ignore[method-assign]
    before, before_predict = cli.AlignCLI.before_fit, cli.AlignCLI.before_predict

    def with_signal(self: cli.AlignCLI) -> None:
        before(self)
        if name != "none":
            self.trainer.callbacks.insert(0, Kill(name, where))  # type: ignore[attr-defined]

    def in_others(self: cli.AlignCLI) -> None:
        if place == "predict":
            before_predict(self)
        self.trainer.callbacks.append(Kill(name, where))  # type: ignore[attr-defined]

    cli.AlignCLI.before_fit = with_signal  # type: ignore[method-assign]
    if place in ("validate", "predict"):
        setattr(cli.AlignCLI, f"before_{place}", in_others)
    cli.run(arguments)


def serve() -> None:
    """Run a command line for each line of JSON on the input, and print its status."""
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            os.chdir(request["folder"])
            forked(request["signal"], request["where"], request["arguments"], Path(request["output"]))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    sys.argv = ["lightning-align"]
    serve()
