"""A rank that dies or raises ends the other one soon, with a message that names it and a status that is not zero."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import FULL
from tests.distributed.harness import ROOT, TORCHRUN, end_ranks, free_port, start_ranks
from tests.toys import tiny_palm

pytestmark = pytest.mark.distributed
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


@pytest.mark.skipif(not FULL, reason="starts whole programs; FULL_STUDIES=1 runs it")
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize(("how", "lost"), [("kill", 0), ("kill", 1), ("raise", 0), ("raise", 1)])
def test_launchers_end_all_ranks(launcher: str, how: str, lost: int, tmp_path: Path) -> None:
    """Lightning's own launcher and torchrun: no process is left behind, and the command fails."""
    script = [str(SCRIPT), str(tmp_path), "ddp", "training", how]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    else:
        command = [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOST": str(lost), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen([*command, *script], stdout=output, stderr=output, env=environment, start_new_session=True)
        code = process.wait(timeout=START)
    deadline = time.monotonic() + LIMIT
    while (left := running(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    told = (tmp_path / "output.txt").read_text()
    for pid in left:
        os.kill(pid, 9)
    assert code != 0 and not left, told
    assert f"Rank {lost} {'died' if how == 'kill' else 'failed'}" in told or launcher == "torchrun", told
    # In the words of Lightning's launcher and of torchrun.
    killed = lost == 0 or any(word in told for word in ("SIGKILL", "Signal 9", "code -9"))
    assert killed if how == "kill" else "No space left" in told, told


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
