"""Memory, open files and threads over thousands of tiny steps of each method, with validation and checkpoints."""

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from benchmarks import common
from lightning_align import (
    RETRO,
    Augment,
    CALMDataModule,
    CALMModule,
    DPODataModule,
    DPOModule,
    GenerationConfig,
    PaLM,
    ReferenceUpdate,
    RETRODataModule,
    RETROModule,
    SelfPlayGeneration,
    SFTDataModule,
    SFTModule,
    SPINDataModule,
    SPINModule,
    build_database,
)

METHODS = ("sft", "dpo", "spin", "calm", "retro")
ROWS, SAMPLES, EVERY = 40, 20, 100
MOST_MIB = 8.0
"""Pages that the allocator keeps come and go. A leak of 1 KiB per step is 10 MiB over half of 20,000 steps."""


class Watch(Callback):
    """Keeps what the process holds, at equal intervals."""

    def __init__(self, steps: int, path: Path | None) -> None:
        self.interval, self.samples, self.path = max(1, steps // SAMPLES), list[tuple[int, float, int, int]](), path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Take a sample."""
        step = trainer.global_step
        if step % self.interval == 0 and (not self.samples or self.samples[-1][0] != step):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            threads = len(os.listdir("/proc/self/task"))
            self.samples.append((step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), threads))
            if self.path:
                self.path.write_text(json.dumps(self.samples))


def rows(folder: Path, names: tuple[str, ...]) -> str:
    """Write sums as rows, and return the path."""
    path = folder / "rows.jsonl"
    sums = [
        {"prompt": f"{i}+{i}=", "response": str(2 * i), "chosen": str(2 * i), "rejected": str(i)} for i in range(1, 1 + ROWS)
    ]
    path.write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in sums))
    return str(path)


def texts(folder: Path, name: str, seed: int) -> str:
    """Write documents of random words, and return their folder."""
    place, draw = folder / name, random.Random(seed)
    place.mkdir()
    for number in range(12):
        (place / f"{number}.txt").write_text(" ".join(f"{draw.randrange(10**4):04}" for _ in range(20)))
    return str(place)


def job(method: str, folder: Path, steps: int) -> tuple[Any, Any, list[Callback]]:
    """Return the module of a method, its data, and its callbacks."""
    palm = functools.partial(PaLM, num_tokens=259, dim=16, depth=2, heads=2, dim_head=8)
    if method == "retro":
        queries = {"validation": texts(folder, "held_out", 1)}
        build_database(str(folder / "db"), texts(folder, "texts", 0), queries=queries, encoder="bm25", chunk_size=8, k=2)
        data = RETRODataModule(str(folder / "db"), validation="validation", num_chunks=2, batch_size=2)
        return RETROModule(RETRO(palm(), chunk_size=8, encoder_depth=1, heads=2)), data, []
    names = ("prompt", "chosen", "rejected") if method == "dpo" else ("prompt", "response")
    path = rows(folder, names)
    options: dict[str, Any] = {"validation": path, "batch_size": 2, "max_length": 24, "cache_dir": str(folder)}
    if method == "sft":
        return SFTModule(palm()), SFTDataModule(path, **options), []
    if method == "dpo":
        return DPOModule(palm(), reference="moving"), DPODataModule(path, **options), [ReferenceUpdate(alpha=0.5, every=50)]
    if method == "calm":
        return CALMModule(palm(), [Augment(palm(dim=8), every=1)]), CALMDataModule(path, **options), []
    # Ten epochs of twenty steps per iteration.
    play = SelfPlayGeneration(iterations=steps // 200 + 1, epochs=10, replay=0, folder=str(folder / "sets"))
    return SPINModule(palm(), generation=GenerationConfig(max_new_tokens=4)), SPINDataModule(path, **options), [play]


def run(method: str, steps: int, path: Path | None = None) -> list[tuple[int, float, int, int]]:
    """Train, and return the samples, which ``path`` holds so far at any moment."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        module, data, callbacks = job(method, folder, steps)
        watch = Watch(steps, path)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=steps,
            check_val_every_n_epoch=None if method != "spin" else 5,
            val_check_interval=EVERY if method != "spin" else None,
            limit_val_batches=2,
            callbacks=[*callbacks, watch, ModelCheckpoint(folder / "checkpoints", every_n_train_steps=EVERY, save_last=True)],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
        assert trainer.global_step == steps, f"{method} ended at step {trainer.global_step}"
    return watch.samples


def median(values: list[float]) -> float:
    """Return the middle value."""
    return sorted(values)[len(values) // 2]


def main() -> None:
    """Run each method in a process of its own, compare the middle of the run with its end, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps per method; 20,000 takes an hour")
    parser.add_argument("--method", choices=METHODS, help="run one method, and print its samples as JSON")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS, help="the methods to compare")
    parser.add_argument("--keep", type=Path, help="folder of samples; a method that has some in it is not run again")
    parser.add_argument("--so-far", type=Path, help="with --method: file of the samples taken so far")
    parser.add_argument("--jobs", type=int, default=1, help="methods that run at the same time")
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(run(arguments.method, arguments.steps, arguments.so_far)))
        return
    lines, claims = [], []
    start = time.perf_counter()

    def samples_of(method: str) -> list[list[float]]:
        kept = arguments.keep and arguments.keep / f"{method}-{arguments.steps}.json"
        if kept and kept.exists():
            return cast("list[list[float]]", json.loads(kept.read_text()))
        command = [sys.executable, __file__, "--method", method, "--steps", str(arguments.steps)]
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            command += ["--so-far", str(kept.with_suffix(".so_far"))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        samples: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
        if kept:
            kept.with_suffix(".so_far").unlink()
            kept.write_text(json.dumps(samples))
        return samples

    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(samples_of, arguments.methods))
    for method, samples in zip(arguments.methods, found, strict=True):
        middle, end = samples[len(samples) // 2 - 2 : len(samples) // 2 + 1], samples[-3:]
        sizes, files, threads = ([median([sample[i] for sample in part]) for part in (middle, end)] for i in (1, 2, 3))
        for number in range(0, len(samples), 4):
            if len(lines) <= number // 4:
                lines.append({"MiB at step": f"{int(samples[number][0]):,}"})
            lines[number // 4][method] = f"{samples[number][1]:.1f}"
        grown = sizes[1] - sizes[0]
        held = f"{files[0]:.0f} and {files[1]:.0f}, {threads[0]:.0f} and {threads[1]:.0f}"
        claims.append(
            common.claim(f"{method}: growth in the second half", f"< {MOST_MIB:.0f} MiB", f"{grown:+.1f} MiB", grown < MOST_MIB)
        )
        same = files[0] == files[1] and threads[0] == threads[1]
        claims.append(common.claim(f"{method}: open files, threads, in the middle and at the end", "equal", held, same))
    common.heading(
        "Memory of long runs",
        f"{arguments.steps:,} steps of each method with a model of 16 channels, with a validation and a checkpoint every "
        f"{EVERY} steps (SPIN validates every {EVERY} steps too, and begins an iteration every 200). Resident memory of the "
        f"process; {time.perf_counter() - start:.0f} s in all.",
    )
    print(common.table(lines))
    print(common.table(claims))
    raise SystemExit(any(row[""] != "met" for row in claims))


if __name__ == "__main__":
    main()
