"""A rank that dies or raises ends the other one soon, with a message that names it and a status that is not zero."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import FULL
from tests.distributed.harness import ROOT, TORCHRUN, end_ranks, free_port, start_ranks
from tests.toys import tiny_palm

pytestmark = [pytest.mark.distributed, pytest.mark.study]
SCRIPT = Path(__file__).with_name("lost.py")

LIMIT = 60.0
"""Seconds from the loss of a rank to the end of the other."""
START = 400.0
"""Seconds for imports and the first steps on a loaded machine."""
INDEPENDENT = {"NODE_RANK": "0"}
"""Environment of processes that no launcher watches, as srun starts them."""
CASES = [
    # strategy, moment, how, lost rank, environment; those of the default run come first
    ("ddp", "training", "kill", 1, INDEPENDENT),
    ("ddp", "generation", "raise", 0, INDEPENDENT),
    ("fsdp2", "training", "raise", 1, INDEPENDENT),
    ("fsdp2", "training", "kill", 0, INDEPENDENT),
    ("fsdp2", "generation", "kill", 1, TORCHRUN),
    ("ddp", "generation", "kill", 0, TORCHRUN),
    ("ddp", "indexing", "kill", 1, INDEPENDENT),
    ("ddp", "indexing", "raise", 0, TORCHRUN),
    ("ddp", "scoring", "kill", 1, INDEPENDENT),
    ("fsdp2", "scoring", "raise", 0, INDEPENDENT),
    ("ddp", "prepare", "raise", 0, INDEPENDENT),
    ("ddp", "prepare", "kill", 0, TORCHRUN),
    ("ddp", "own_module", "kill", 1, INDEPENDENT),
    ("ddp", "own_module", "raise", 0, INDEPENDENT),
]


@pytest.mark.parametrize(("strategy", "moment", "how", "lost", "environment"), CASES if FULL else CASES[:2])
def test_a_lost_rank_ends_the_other(
    strategy: str, moment: str, how: str, lost: int, environment: dict[str, str], tmp_path: Path
) -> None:
    """The rank that raises hangs in another callback afterwards, so that nothing but our message reaches the other one."""
    outputs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    own = {**environment, "LOST": str(lost)}
    torch.save(tiny_palm().state_dict(), tmp_path / "base.pt")
    processes = start_ranks(SCRIPT, (str(tmp_path), strategy, moment, how), outputs, own)
    began, other = time.monotonic(), 1 - lost
    while not (tmp_path / "lost").exists() and time.monotonic() - began < START:
        time.sleep(0.1)
    began = time.monotonic()
    while processes[other].exitcode is None and time.monotonic() - began < LIMIT:
        time.sleep(0.1)
    codes = end_ranks(processes)
    told = outputs[other].read_text()
    assert codes[other] not in (None, 0), told + outputs[lost].read_text()
    assert codes[lost] == (-9 if how == "kill" else None), outputs[lost].read_text()
    if how == "kill":
        assert f"Rank {lost} died" in told and "memory" in told
    else:
        assert f"ank {lost} failed" in told and "No space left on device" in told


LAUNCHED = [
    # The process of rank 0 is the launcher of the other.
    ("lightning", "kill", 0),
    ("lightning", "raise", 1),
    # Its agent is a process of its own, to which all ranks are alike.
    ("torchrun", "kill", 1),
]


@pytest.mark.skipif(not FULL, reason="starts whole programs; FULL_STUDIES=1 runs it")
def test_launchers_end_all_ranks(tmp_path: Path) -> None:
    """Lightning's own launcher and torchrun: no process is left behind, and the command fails. All run at the same time."""
    folders = [tmp_path / "-".join(map(str, case)) for case in LAUNCHED]
    processes = [start_launcher(*case, folder) for case, folder in zip(LAUNCHED, folders, strict=True)]
    deadline = time.monotonic() + START
    try:
        codes = [process.wait(timeout=max(0, deadline - time.monotonic())) for process in processes]
        deadline = time.monotonic() + LIMIT
        while (left := [pid for process in processes for pid in running(process.pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        remaining = [described(pid) for pid in left]
    finally:
        for pid in [pid for process in processes for pid in running(process.pid)]:
            os.kill(pid, signal.SIGKILL)
    for (launcher, how, lost), folder, code in zip(LAUNCHED, folders, codes, strict=True):
        told = (folder / "output.txt").read_text()
        assert code != 0 and not remaining, (remaining, told)
        assert f"Rank {lost} {'died' if how == 'kill' else 'failed'}" in told or launcher == "torchrun", told
        # In the words of Lightning's launcher and of torchrun.
        killed = lost == 0 or any(word in told for word in ("SIGKILL", "Signal 9", "code -9"))
        assert killed if how == "kill" else "No space left" in told, told


def start_launcher(launcher: str, how: str, lost: int, folder: Path) -> "subprocess.Popen[bytes]":
    """Start a training in which a rank is lost, in a session of its own."""
    folder.mkdir()
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command += [str(SCRIPT), str(folder), "ddp", "training", how]
    own = {"PYTHONPATH": str(ROOT), "LOST": str(lost), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **own}, start_new_session=True)


def described(pid: int) -> str:
    """What a process is and what it waits for."""
    try:
        texts = [Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ") for name in ("cmdline", "wchan", "status")]
    except OSError:
        return f"{pid}, which has ended now"
    return f"{pid}: {texts[0]} waits in {texts[1]}; {' '.join(texts[2].split())[:200]}"


def running(session: int) -> list[int]:
    """Return the processes of a session that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
