"""Takes the pictures of TensorBoard in the documentation: a short run of each method, and headless Chromium.

    python docs/screenshots.py [FOLDER]

The runs and the pictures are written to FOLDER, by default build/screenshots. The pictures are copied to docs/images. Needs the
command `chromium`. On a machine with a few cores it takes some minutes.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

IMAGES = Path(__file__).resolve().parent / "images"
SMALL = [
    "--model.backbone.init_args.dim",
    "64",
    "--model.backbone.init_args.depth",
    "2",
    "--model.backbone.init_args.heads",
    "4",
]
EVERY = ["--trainer.log_every_n_steps", "5", "--data.batch_size", "16"]
CALLBACKS = (
    "[{class_path: SampleLogger, init_args: {max_new_tokens: 12}}, {class_path: ModelCheckpoint, init_args: {save_last: true}}]"
)
PICTURES = {"sft": "sft_arithmetic", "dpo": "dpo", "spin": "spin_arithmetic", "calm": "calm_key_value", "retro": "retro_facts"}
"""The run of each picture."""
FACTS = {"num_facts": 200, "num_held_out": 40, "num_notes": 40}


def rate(steps: int, every: int) -> list[str]:
    """The options of the length of a run and of its validations."""
    return ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(every)]


def facts(role: str) -> dict[str, object]:
    """A source of RETRO."""
    return {"class_path": "Facts", "init_args": {"role": role, **FACTS}}


def runs(folder: Path) -> dict[str, list[str]]:
    """The command line of each run, by the name of its folder."""
    # A third of the pairs is hard to learn, and the others are easy.
    wrong = ("{} or so", "{}?", "{}")
    pairs = [
        {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": wrong[(a + b) % 3].format(a + b + 1)}
        for a in range(20)
        for b in range(20)
    ]
    for name, rows in (("pairs", pairs[::2]), ("pairs_valid", pairs[1::8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = "{class_path: Arithmetic, init_args: {num_rows: 100, split: validation}}"
    play = (
        "[{class_path: SelfPlayGeneration, init_args: {iterations: 3, epochs: 1}}, {class_path: SampleLogger, init_args: "
        "{max_new_tokens: 12}}]"
    )
    indexing = {
        "database": ".cache/retro/facts",
        "documents": facts("database"),
        "queries": {"train": facts("train"), "validation": facts("validation")},
        "encoder": "bm25",
        "chunk_size": 16,
        "k": 2,
    }
    retro = json.dumps([{"class_path": "RetrievalIndexing", "init_args": indexing}, {"class_path": "NeighborPanel"}])
    start = ["--model.init_from", "runs/sft_arithmetic/last.ckpt"]
    anchors = {
        name: ["--config", f"calm/key_value_{name}", *SMALL, *rate(40, 40), "--trainer.callbacks", CALLBACKS, *EVERY]
        for name in ("anchor", "augment")
    }
    keys = [
        "--model.augments",
        "[{model: runs/calm_augment/last.ckpt, connections: null, num_connections: 2}]",
        "--model.attention_maps",
        "true",
    ]
    return {
        "sft_arithmetic": [
            *("--config", "sft/arithmetic", *SMALL, *rate(200, 25), *EVERY, "--trainer.callbacks", CALLBACKS),
            *("--data.validation", sums),
        ],
        "dpo": [
            *("--config", "dpo/jsonl", *start, *rate(120, 15), *EVERY, "--data.train", "pairs.jsonl"),
            *("--data.validation", "pairs_valid.jsonl", "--trainer.callbacks", CALLBACKS),
            *("--model.optimizer.init_args.lr", "2e-4"),
        ],
        "spin_arithmetic": [
            *("--config", "spin/arithmetic", *start, *EVERY, "--trainer.callbacks", play, "--data.validation", sums),
            *("--data.train", "{class_path: Arithmetic, init_args: {num_rows: 320, seed: 7}}"),
        ],
        "calm_anchor": anchors["anchor"],
        "calm_augment": anchors["augment"],
        "calm_key_value": ["--config", "calm/key_value", *keys, *rate(80, 10), *EVERY, "--trainer.callbacks", CALLBACKS],
        "retro_facts": ["--config", "retro/facts", *rate(160, 20), *EVERY, "--trainer.callbacks", retro],
    }


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve a run. The page shows the folder, so its name is relative."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "tensorboard.main", "--logdir", f"runs/{folder.name}", "--port", str(port), "--load_fast", "false"]
    server = subprocess.Popen([sys.executable, *words], cwd=folder.parent.parent, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            time.sleep(0.5)
            try:
                if json.load(urlopen(f"{address}/data/runs")):
                    break
            except OSError:
                continue
        yield address
    finally:
        server.terminate()
        server.wait()


def take(address: str, file: Path, *, size: str = "1280,900") -> None:
    """Take a picture of a page, when it has had time to draw its charts."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"]
    file.unlink(missing_ok=True)
    subprocess.run(
        ["chromium", *options, "--virtual-time-budget=60000", f"--screenshot={file}", address],
        check=True,
        stderr=subprocess.DEVNULL,
        timeout=300,
    )


def main() -> None:
    """Run the methods that have no run yet, and take the pictures."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/screenshots").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in runs(folder).items():
        if (folder / "runs" / name / "done").exists():
            continue
        print(f"run: {name}", flush=True)
        command = [sys.executable, "-m", "lightning_align", "fit", *words, "--trainer.enable_progress_bar", "false"]
        subprocess.run(command, cwd=folder, check=True)
        (folder / "runs" / name / "done").touch()
    for method, name in PICTURES.items():
        with tensorboard(folder / "runs" / name) as address:
            file = folder / f"tensorboard_{method}.png"
            take(f"{address}/#custom_scalars", file)
            shutil.copy(file, IMAGES)
            print(file, flush=True)


if __name__ == "__main__":
    main()
