"""Starts a script in several processes, as a launcher would, and ends it for sure."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import warnings
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
# Imports take a rank longer than all else, so one process does them, and ranks are forks of it. It runs nothing itself.
CONTEXT = multiprocessing.get_context("forkserver")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "tests"}  # what makes Lightning take these ranks for torchrun's
SCRIPTS = (
    "distributed.deferred",
    "distributed.methods",
    "distributed.by_hand",
    "distributed.train",
    "distributed.spin",
    "distributed.index",
    "distributed.team",
    "distributed.lost",
    "distributed.tensor",
    "distributed.switch",
    "distributed.stops",
    "retro.train",
    "calm.train_distributed",
)
CONTEXT.set_forkserver_preload([*(f"tests.{name}" for name in SCRIPTS), "transformers", "peft"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def run_rank(script: Path, arguments: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
    """Be one rank: what the script prints goes to a file, and its exit status is this process's."""
    os.setsid()
    os.environ.update(environment)
    os.chdir(script.parent)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.filterwarnings("error", category=UserWarning, module="lightning_align")
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def start_ranks(
    script: Path, arguments: tuple[str, ...], outputs: list[Path], environment: dict[str, str] | None = None
) -> list[Any]:
    """Start one process per output file, each with the environment of a rank of torchrun or the given one."""
    port, processes = str(free_port()), []
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()
    for rank, output in enumerate(outputs):
        own = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(len(outputs)),
            "LOCAL_RANK": str(rank),
            "GLOO_SOCKET_IFNAME": "lo",
            **(TORCHRUN if environment is None else environment),
        }
        if "TORCHELASTIC_RUN_ID" in own:
            own |= {"RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(outputs)), "GROUP_RANK": "0"}
        process = CONTEXT.Process(target=run_rank, args=(script, arguments, own, output))
        process.start()
        processes.append(process)
    return processes


def end_ranks(processes: list[Any]) -> list[int | None]:
    """End the processes that still run, and return the exit statuses; None for one that had to be ended."""
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            try:
                os.killpg(process.pid or 0, signal.SIGKILL)
            except ProcessLookupError:  # it has no session yet
                process.kill()
        process.join()
    return codes


def launch(script: Path, *arguments: str, ranks: int = 2, timeout: float = 500) -> None:
    """Run ``script arguments`` once a rank, all on this machine, and fail with their output if one of them fails.

    A rank that fails leaves the others waiting in a collective, and Lightning catches SIGTERM: so each has a session of its
    own, which is killed whole.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.txt" for rank in range(ranks)]
        processes = start_ranks(script, arguments, outputs)
        deadline = time.monotonic() + timeout
        try:
            # One that failed is the end: the others may wait for it for ever.
            while any(process.exitcode is None for process in processes) and not any(p.exitcode for p in processes):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            codes = end_ranks(processes)
        if any(code != 0 for code in codes):
            told = "\n".join(
                f"--- rank {rank}, {f'killed, with a limit of {timeout} s' if code is None else f'exit {code}'}\n"
                + (outputs[rank].read_text() if outputs[rank].exists() else "")
                for rank, code in enumerate(codes)
            )
            raise AssertionError(f"{script.name} {' '.join(arguments)} failed:\n{told}")
