"""Self-play under twenty SIGKILLs: weights and responses against those of an uninterrupted run."""

import argparse
import functools
import hashlib
import json
import logging
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks import common
from lightning_align import GenerationConfig, PaLM, SelfPlayGeneration, SPINDataModule, SPINModule
from lightning_align.spin.generations import GeneratedSet
from lightning_align.spin.play import Play

ROWS, ITERATIONS, LIMIT = 32, 14, 600.0
GENERATING, TRAINING = b"\1", b"\2"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, in order of steps."""
    found = [path for path in folder.glob("step=*.ckpt") if zipfile.is_zipfile(path)]
    return sorted(found, key=lambda path: int(path.stem.partition("=")[2]))


def train(folder: Path, phase: mmap.mmap) -> None:
    """Resume from the last checkpoint and train to the end."""
    run, write = Play.run, GeneratedSet.write

    def watched_run(self: Play, missing: list[int]) -> None:
        phase[:1] = GENERATING
        run(self, missing)
        phase[:1] = TRAINING

    def watched_write(self: GeneratedSet, part: int, rows: Any) -> None:
        write(self, part, rows)
        with (folder / "journal.txt").open("a") as journal:
            journal.write(f"{self.path(part)}\n")

    Play.run, GeneratedSet.write = watched_run, watched_write  # type: ignore[method-assign]
    L.seed_everything(0, verbose=False)
    rows = str(folder.parent / "rows.jsonl")
    module = SPINModule(
        PaLM(num_tokens=259, dim=32, depth=1, heads=2, dim_head=16, ff_dropout=0.1),
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3),
        generation=GenerationConfig(max_new_tokens=24, batch_size=4, seed=1),
    )
    data = SPINDataModule(rows, validation=rows, batch_size=4, max_length=40, cache_dir=str(folder.parent / "cache"))
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[SelfPlayGeneration(iterations=ITERATIONS, folder=str(folder / "sets")), keep],
    )
    found = checkpoints(folder)
    trainer.fit(module, data, ckpt_path=found[-1] if found else None, weights_only=True)
    torch.save(module.policy.state_dict(), folder / "policy.pt")


def progress(folder: Path) -> int:
    """Number of steps taken and of files written."""
    found = checkpoints(folder)
    steps = int(found[-1].stem.partition("=")[2]) if found else 0
    return steps + len(list(folder.glob("sets/*/*/part-*.jsonl")))


def child(folder: Path, kill_in: bytes | None = None, wait: float = 0.0) -> bool:
    """Train in a child process; returns whether it reached the end.

    Args:
        folder: folder of the run.
        kill_in: phase in which to kill it, once it has made progress; None to let it run.
        wait: seconds to wait before the kill.
    """
    before, phase = progress(folder), mmap.mmap(-1, 1)
    process = os.fork()
    if process == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            train(folder, phase)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    begin = time.monotonic()
    while time.monotonic() - begin < LIMIT:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit("training failed")
            return True
        if kill_in is not None and phase[:1] == kill_in and progress(folder) > before:
            time.sleep(wait)
            break
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    if time.monotonic() - begin >= LIMIT:
        raise SystemExit("training hangs")
    return False


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of generated responses."""
    parts = sorted(folder.glob("sets/*/*/part-*.jsonl"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}


def main() -> None:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    rows = [{"prompt": f"{i}+{i * i}{'=' * (1 + i % 3)}", "response": str(i + i * i)} for i in range(ROWS)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, killed = root / "whole", root / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    child(whole)
    draw, met = random.Random(arguments.seed), Counter[str]()
    for number in range(arguments.kills):
        phase = (GENERATING, TRAINING)[number % 2]
        if child(killed, phase, draw.uniform(0, 0.05)):
            raise SystemExit(f"the run ended after {number} kills")
        met["while generating" if phase == GENERATING else "while training"] += 1
    child(killed)
    ours, theirs = (torch.load(folder / "policy.pt", weights_only=True) for folder in (killed, whole))
    if any(not torch.equal(ours[name], theirs[name]) for name in theirs) or hashes(killed) != hashes(whole):
        raise SystemExit("the killed run has different weights or responses")
    written = (killed / "journal.txt").read_text().splitlines()
    if len(written) != len(set(written)):
        raise SystemExit("a file was generated twice")
    kills = ", ".join(f"{count} {where}" for where, count in sorted(met.items()))
    common.heading(
        "Self-play under SIGKILLs",
        f"{ITERATIONS} iterations of generation and training, killed {arguments.kills} times ({kills}) and resumed from the "
        "last checkpoint, against an uninterrupted run: bitwise equal weights, identical bytes in all "
        f"{len(hashes(whole))} files of responses, and no file written twice.",
    )


if __name__ == "__main__":
    main()
