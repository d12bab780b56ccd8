"""All methods under SIGKILLs at random moments: weights of the resumed runs against those of uninterrupted runs.

A thousand kills are for a night. The counts are kept in a file, from which the script goes on after it was stopped itself::

    nice python benchmarks/studies/kills.py --until 36000 --progress kills.json
"""

import argparse
import functools
import hashlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from benchmarks import common
from benchmarks.studies.long_runs import METHODS, texts
from lightning_align import (
    RETRO,
    Augment,
    CALMDataModule,
    CALMModule,
    DPODataModule,
    DPOModule,
    GenerationConfig,
    PaLM,
    RetrievalIndexing,
    RETRODataModule,
    RETROModule,
    SelfPlayGeneration,
    SFTDataModule,
    SFTModule,
    SPINDataModule,
    SPINModule,
)
from lightning_align.runtime.files import publish_text
from lightning_align.training.newest import newest_checkpoint

ROWS, KILLS_PER_RUN, LIMIT = 22, 5, 900.0
WORK = {
    "sft": "accumulation, workers of the data loader",
    "dpo": "scores of a stored reference before the training",
    "spin": "two iterations of self-play",
    "calm": "hidden states stored while training",
    "retro": "a database built before the training",
}
"""What a run of each method does besides steps, validations and a checkpoint after each step."""


def job(method: str, folder: Path) -> tuple[Any, Any, list[Callback]]:
    """Return the module of a method, its data, and its callbacks."""
    palm = functools.partial(PaLM, num_tokens=259, dim=16, depth=2, heads=2, dim_head=8)
    adam: Any = functools.partial(torch.optim.AdamW, lr=1e-2)
    if method == "retro":
        index = RetrievalIndexing(
            str(folder / "database"),
            documents=str(folder / "texts"),
            queries={"validation": str(folder / "held_out")},
            encoder="bm25",
            tokenizer="bytes",
            chunk_size=8,
            k=2,
        )
        data = RETRODataModule(str(folder / "database"), validation="validation", num_chunks=2, batch_size=8)
        return RETROModule(RETRO(palm(), chunk_size=8, encoder_depth=1, heads=2), optimizer=adam), data, [index]
    path = str(folder / "rows.jsonl")
    options: dict[str, Any] = {"validation": path, "batch_size": 2, "max_length": 24, "cache_dir": str(folder / "cache")}
    if method == "sft":
        return SFTModule(palm(ff_dropout=0.1), optimizer=adam), SFTDataModule(path, num_workers=1, **options), []
    if method == "dpo":
        module = DPOModule(palm(), reference="stored", reference_cache=str(folder / "scores"), optimizer=adam)
        return module, DPODataModule(path, **options), []
    if method == "calm":
        calm = CALMModule(palm(), [Augment(palm(dim=8), every=1)], store_states=str(folder / "states"), optimizer=adam)
        return calm, CALMDataModule(path, **options), []
    play = SelfPlayGeneration(iterations=2, epochs=1, folder=str(folder / "sets"))
    return (
        SPINModule(palm(), generation=GenerationConfig(max_new_tokens=4), optimizer=adam),
        SPINDataModule(path, **options),
        [play],
    )


def prepare(method: str, folder: Path) -> None:
    """Write the sources of a run."""
    folder.mkdir(parents=True)
    if method == "retro":
        texts(folder, "texts", 0), texts(folder, "held_out", 1)
        return
    names = ("prompt", "chosen", "rejected") if method == "dpo" else ("prompt", "response")
    rows = [
        {"prompt": f"{i}+{i}=", "response": str(2 * i), "chosen": str(2 * i), "rejected": str(i)} for i in range(1, 1 + ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows))


def train(method: str, folder: Path) -> None:
    """Go on from the newest whole checkpoint to the end, and write the hash of the weights."""
    L.seed_everything(0, verbose=False)
    module, data, callbacks = job(method, folder)
    keep = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1 if method == "spin" else 2,
        accumulate_grad_batches=3 if method == "sft" else 1,
        val_check_interval=0.5 if method != "spin" else None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[*callbacks, keep],
    )
    found = newest_checkpoint([folder / "checkpoints"], folder, resumes=True)
    trainer.fit(module, data, ckpt_path=found.path, weights_only=True if found.path else None)
    state = sorted(module.policy.state_dict().items())
    digest = hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for _, value in state)).hexdigest()
    publish_text(folder / "end", f"{digest} {trainer.global_step}")


def child(method: str, folder: Path, kill_after: float | None) -> bool:
    """Train in a child process. Return whether it was killed.

    Args:
        method: The method.
        folder: The folder of the run.
        kill_after: Seconds after which it is killed; None to let it end.
    """
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            train(method, folder)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    begin = time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"{method} failed after a kill:\n{(folder / 'output.txt').read_text()[-3000:]}")
            return False
        waited = time.monotonic() - begin
        if waited > LIMIT or (kill_after is not None and waited > kill_after):
            try:
                os.killpg(process, signal.SIGKILL)
            except ProcessLookupError:  # it has no group yet
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            if waited > LIMIT:
                raise SystemExit(f"{method} hangs")
            return True
        time.sleep(0.002)


def main() -> None:
    """Kill, compare, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="kills of all methods together")
    parser.add_argument("--progress", type=Path, help="the file of the counts; the script goes on from it")
    parser.add_argument("--until", type=float, default=3600, help="seconds after which no further run begins")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begin = time.monotonic()
    counts: dict[str, dict[str, int]] = {name: dict.fromkeys(("runs", "kills", "different"), 0) for name in METHODS}
    if arguments.progress and arguments.progress.exists():
        counts = json.loads(arguments.progress.read_text())

    def total(of: str) -> int:
        return sum(count[of] for count in counts.values())

    with tempfile.TemporaryDirectory() as top:
        whole: dict[str, tuple[str, float]] = {}
        while total("kills") < arguments.kills and time.monotonic() - begin < arguments.until:
            method = min(METHODS, key=lambda name: counts[name]["kills"])
            if method not in whole:
                folder = Path(top) / method
                prepare(method, folder)
                start = time.monotonic()
                child(method, folder, None)
                whole[method] = ((folder / "end").read_text(), time.monotonic() - start)
            expected, seconds = whole[method]
            number = counts[method]["runs"]
            draw, folder, kills = random.Random(f"{method} {number}"), Path(top) / f"{method}-{number}", 0
            prepare(method, folder)
            ended = False
            while not ended and kills < KILLS_PER_RUN:
                ended = not child(method, folder, draw.uniform(0, seconds))
                kills += not ended
            if not ended:
                child(method, folder, None)
            counts[method]["runs"] += 1
            counts[method]["kills"] += kills
            counts[method]["different"] += (folder / "end").read_text() != expected
            if arguments.progress:
                publish_text(arguments.progress, json.dumps(counts, indent=2) + "\n")
    common.heading(
        "All methods under SIGKILLs",
        f"{total('kills'):,} of {arguments.kills:,} SIGKILLs, at random moments over {total('runs')} runs, each resumed from "
        "its newest whole checkpoint. A killed run must end at the step of an uninterrupted run, with the same weights bit for "
        "bit.",
    )
    rows = []
    for name, count in counts.items():
        claim = common.claim(f"{name}: runs that end otherwise", "0", str(count["different"]), not count["different"])
        rows.append({"method": name, "besides steps and checkpoints": WORK[name], "kills": f"{count['kills']}", **claim})
    print(common.table(rows))
    raise SystemExit(bool(total("different")))


if __name__ == "__main__":
    main()
