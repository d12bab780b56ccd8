"""Twenty SIGKILLs over the four stages, then the hashes of all files against those of a build that nobody disturbed."""

import argparse
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import _common as common
import torch

from lightning_align.data.documents import StandardLibrary
from lightning_align.models.palm import PaLM
from lightning_align.retrieval import chunks, encoders, neighbors
from lightning_align.retrieval.encoders import LMEncoder
from lightning_align.retro.indexing import build_database

STAGES = ("chunks", "vectors", "index", "neighbors")


def build(folder: Path, verify: float) -> None:
    """A database of a part of the standard library, by a small untrained model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = PaLM(num_tokens=259, dim=32, depth=1, heads=2, dim_head=16).requires_grad_(False)
    source = StandardLibrary(part="held_out", held_out=0.1)
    build_database(folder, source, encoder=LMEncoder(model, fingerprint="fixed"), k=4, verify=verify)


def hashes(folder: Path) -> dict[str, str]:
    """Of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def where(folder: Path) -> str:
    """The stage that was at work: the first that has not come to its end."""
    done = {path.parent.name.split("-")[0] for path in folder.glob("*/manifest.json")}
    return next((stage for stage in STAGES if stage not in done), "head")


def main() -> None:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    chunks.BLOCK_BYTES, encoders.BLOCK_CHUNKS, neighbors.BLOCK_CHUNKS = 100_000, 1024, 1024
    root = Path(tempfile.mkdtemp())
    draw, met = random.Random(arguments.seed), Counter[str]()
    for number in range(-1, arguments.kills + 1):
        # -1 is the undisturbed build, the last one brings the killed build to its end.
        target = root / ("whole" if number < 0 else "killed")
        child = os.fork()
        if child == 0:
            build(target, 0.01)
            os._exit(0)
        if 0 <= number < arguments.kills:
            time.sleep(draw.uniform(0.1, 1.2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if 0 <= number < arguments.kills:
            stage = where(target)
            met[stage if os.WIFSIGNALED(status) else "finished before"] += 1
            if stage == "head" and number < arguments.kills - 1:
                shutil.rmtree(target)  # all done before the kills were used up: from the start
        elif os.waitstatus_to_exitcode(status):
            raise SystemExit("a build that was not killed failed")
    same = hashes(root / "whole") == hashes(root / "killed")
    common.heading(
        "A database whose build is killed",
        f"{arguments.kills} SIGKILLs at random moments, seed {arguments.seed}: {dict(met)}; then to the end.",
    )
    claim = common.claim("SHA-256 of all files", "equal", "equal" if same else "different", same)
    print(common.table([claim | {"files": str(len(hashes(root / "whole")))}]))
    shutil.rmtree(root)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
