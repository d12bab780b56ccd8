"""Starts a script in several processes, as a launcher would, and ends it for sure."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def launch(script: Path, *arguments: str, ranks: int = 2, timeout: float = 500) -> None:
    """Run ``script arguments`` once a rank, all on this machine, and fail with their output if one of them fails.

    A rank that fails leaves the others waiting in a collective, and Lightning catches SIGTERM: so each has a session of its
    own, which is killed whole.
    """
    port, processes = str(free_port()), []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "tests",  # what makes Lightning take these ranks for torchrun's
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-W", "error::UserWarning:lightning_align", str(script), *arguments]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                cwd=script.parent,
            )
        )
    outputs = ["" for _ in processes]
    try:
        for index, process in enumerate(processes):
            outputs[index], _ = process.communicate(timeout=timeout)
            if process.returncode:
                break  # the others may wait for it for ever
    except subprocess.TimeoutExpired:
        outputs[index] += f"\nrank {index} did not end in {timeout} s"
    finally:
        codes = [process.poll() for process in processes]
        for index, process in enumerate(processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                outputs[index] += process.communicate()[0] or ""
            elif process.stdout is not None and not process.stdout.closed:
                outputs[index] += process.stdout.read()
                process.stdout.close()
    if any(code != 0 for code in codes):  # None is of a rank that did not end
        told = "\n".join(
            f"--- rank {rank}, exit {code}\n{text}" for rank, (code, text) in enumerate(zip(codes, outputs, strict=True))
        )
        raise AssertionError(f"{script.name} {' '.join(arguments)} failed:\n{told}")
