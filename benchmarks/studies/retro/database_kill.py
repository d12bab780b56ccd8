"""A database build under twenty SIGKILLs, five per stage: file hashes against those of an uninterrupted build."""

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

import torch

from benchmarks import common
from lightning_align.data.documents import FolderDocuments, StandardLibrary
from lightning_align.models.palm import PaLM
from lightning_align.retrieval import chunks, encoders, neighbors
from lightning_align.retrieval.encoders import LMEncoder
from lightning_align.retro.indexing import build_database

STAGES = ("chunks", "vectors", "index", "neighbors")


def build(folder: Path, texts: Path) -> None:
    """Build a database of a folder, with a small untrained model as the encoder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = PaLM(num_tokens=259, dim=32, depth=1, heads=2, dim_head=16).requires_grad_(False)
    build_database(folder, FolderDocuments(str(texts)), encoder=LMEncoder(model, fingerprint="fixed"), k=4)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def begun(folder: Path) -> int:
    """Number of stages that have started. A stage makes its folder when it writes its first block."""
    names = {path.name.split("-")[0] for path in folder.glob("*-*")}
    return sum(stage in names for stage in STAGES)


def start(folder: Path, texts: Path) -> int:
    """Start a child process that builds the database, and return its id."""
    child = os.fork()
    if child == 0:
        build(folder, texts)
        os._exit(0)
    return child


def finish(folder: Path, texts: Path) -> None:
    """Build to the end."""
    _, status = os.waitpid(start(folder, texts), 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("a build failed without being killed")


def main() -> None:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    chunks.BLOCK_BYTES, encoders.BLOCK_CHUNKS, neighbors.BLOCK_CHUNKS = 100_000, 1024, 1024
    root = Path(tempfile.mkdtemp())
    texts, whole, killed = (root / name for name in ("texts", "whole", "killed"))
    for document in StandardLibrary(part="held_out", held_out=0.1).documents():
        path = texts / document.id
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text, encoding="utf-8")
    finish(whole, texts)
    draw, met = random.Random(arguments.seed), Counter[str]()
    while (number := met.total()) < arguments.kills:
        stage = number * len(STAGES) // arguments.kills
        child, ended = start(killed, texts), 0
        while begun(killed) <= stage and not ended:
            time.sleep(0.005)
            ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(draw.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                met[STAGES[begun(killed) - 1]] += 1
                continue
        shutil.rmtree(killed)  # the build was faster than the kill: start over
    finish(killed, texts)
    same = hashes(whole) == hashes(killed)
    common.heading(
        "A database build under SIGKILLs",
        f"{arguments.kills} SIGKILLs at random moments, seed {arguments.seed}; kills per stage: "
        f"{', '.join(f'{stage} {count}' for stage, count in met.items())}. Then the build runs to the end.",
    )
    claim = common.claim("SHA-256 of all files", "equal", "equal" if same else "different", same)
    print(common.table([claim | {"files": str(len(hashes(whole)))}]))
    shutil.rmtree(root)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
