"""Rows per second, memory and start-up of the preparation of preference pairs, against the tokenizer alone and TRL.

The rows are those of a file, repeated with their numbers changed, so that no two are equal. The tokenizer alone encodes
the texts of the first rows (each prompt, and each response with its prompt) with `encode_batch` and all cores. The sides
take turns.
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import common

SIDES = ("tokenizer", "ours", "first batch", "peer")
SAMPLE = 20_000
"""The number of rows that the tokenizer alone encodes."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", metavar="FILE", help="JSONL with prompt, chosen and rejected; default: worked sums")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="numbers of pairs")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of up to 100,000 rows; more rows are prepared once")
    parser.add_argument("--workers", type=int, default=0, help="our processes; 0: all cores")
    parser.add_argument("--peer-rows", type=int, default=100_000, help="the largest number of rows that TRL prepares")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def base_rows(path: str | None) -> list[dict[str, str]]:
    """The rows that are repeated."""
    if path is not None:
        return common.read_rows(path)
    from lightning_align.data.tasks.arithmetic import Arithmetic

    answers = list(Arithmetic(2000).rows())
    return [{"prompt": row["prompt"], "chosen": row["response"], "rejected": f"{row['response']}0"} for row in answers]


def raised(text: str, by: int) -> str:
    """The text with other numbers."""
    return re.sub(r"\d+", lambda found: str(int(found[0]) + by), text)


def write_rows(base: list[dict[str, str]], count: int, path: Path) -> None:
    """Write rows of which each has other numbers."""
    numbers = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in itertools.islice(itertools.cycle(base), count):
            changed = {name: raised(text, numbers.randint(1, 10**5)) for name, text in row.items()}
            file.write(json.dumps(changed, ensure_ascii=False) + "\n")


def family(process: int) -> Iterator[int]:
    """A process and its descendants."""
    yield process
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))
    except OSError:
        return  # it ended


def run_side(options: argparse.Namespace, side: str, folder: Path) -> dict[str, Any]:
    """Run a side in its own process, and add the peak memory of that process and of its largest worker, in bytes."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--workers", str(options.workers)]
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for member in family(process.pid):
                try:
                    status = Path(f"/proc/{member}/status").read_text()
                except OSError:
                    continue
                if found := re.search(r"VmHWM:\s+(\d+)", status):
                    peaks[member] = int(found[1]) * 1024
            time.sleep(0.05)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{side} failed")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    result["memory"] = peaks.pop(process.pid, 0)
    return {**result, "worker memory": max(peaks.values(), default=0), "workers": len(peaks)}


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the rows, or open what is prepared and load the first batch."""
    import logging

    from lightning_align.dpo.datamodule import DPODataModule

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = options.folder
    start = time.perf_counter()
    data = DPODataModule(
        str(folder / "rows.jsonl"),
        tokenizer=str(folder / "tokenizer.json"),
        preparation_workers=options.workers,
        cache_dir=str(folder / "cache"),
    )
    data.prepare_data()
    prepared = time.perf_counter()
    data.setup("fit")
    next(iter(data.train_dataloader()))
    return {"seconds": prepared - start, "to first batch": time.perf_counter() - start}


def tokenize(options: argparse.Namespace) -> dict[str, Any]:
    """Encode the texts of the first rows with the tokenizer alone."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    with (options.folder / "rows.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, SAMPLE)]
    texts = [row["prompt"] + answer for row in rows for answer in ("", row["chosen"], row["rejected"])]
    start = time.perf_counter()
    for first in range(0, len(texts), 3072):
        model.encode_batch(texts[first : first + 3072], add_special_tokens=False)
    return {"rows": len(rows), "seconds": time.perf_counter() - start}


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """Read and prepare the rows as TRL's `DPOTrainer` does when it is made."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from benchmarks.common import peer_trl

    folder = options.folder
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    models = {"model": peer_trl.llama(8192), "ref_model": peer_trl.llama(8192)}
    workers = options.workers or len(os.sched_getaffinity(0))
    start = time.perf_counter()
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "peer"))
    settings = {**peer_trl.settings(8), "dataset_num_proc": workers}
    DPOTrainer(**models, args=DPOConfig(**settings), train_dataset=rows, processing_class=tokenizer)
    return {"seconds": time.perf_counter() - start}


def measure(options: argparse.Namespace, base: list[dict[str, str]], count: int) -> tuple[dict[str, str], float | None]:
    """Measure all sides on a number of rows. Also return the speed over the peer, if it ran."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(base, count, folder / "rows.jsonl")
        write_rows(base, 5000, folder / "corpus.jsonl")
        from lightning_align.data.tokenizer import train_tokenizer

        train_tokenizer([str(folder / "corpus.jsonl")], output=str(folder / "tokenizer.json"), vocab_size=8192)
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        others = []
        for _ in range(options.rounds if count <= 100_000 else 1):
            for side in ("tokenizer", "ours", "tokenizer"):
                if side == "ours":
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                with common.Meter() as meter:
                    found[side].append(run_side(options, side, folder))
                others.append(meter.others)
        found["first batch"].append(run_side(options, "first batch", folder))
        if count <= options.peer_rows:
            found["peer"].append(run_side(options, "peer", folder))
    speeds = [count / result["seconds"] for result in found["ours"]]
    alone = [result["rows"] / result["seconds"] for result in found["tokenizer"]]
    ratios = [speed * 2 / sum(alone[2 * i : 2 * i + 2]) for i, speed in enumerate(speeds)]
    ours, theirs = found["ours"][-1], found["peer"]
    row = {
        "pairs": f"{count:,}",
        "pairs/s": f"{common.median(speeds):,.0f}",
        "/ tokenizer alone": f"{common.median(ratios):.2f}",
        "memory": f"{ours['memory'] / common.MIB:,.0f} MiB",
        "each worker": f"{ours['worker memory'] / common.MIB:,.0f} MiB" if ours["workers"] else "none",
        "cache to first batch": f"{found['first batch'][-1]['to first batch']:.1f} s",
        "TRL pairs/s": f"{count / theirs[-1]['seconds']:,.0f}" if theirs else "",
        "TRL memory": f"{theirs[-1]['memory'] / common.MIB:,.0f} MiB" if theirs else "",
        "TRL each worker": f"{theirs[-1]['worker memory'] / common.MIB:,.0f} MiB" if theirs else "",
        "background load": f"{common.median(others):.2f}",
    }
    return row, common.median(speeds) * theirs[-1]["seconds"] / count if theirs else None


def main() -> None:
    """Measure and print."""
    options = arguments()
    if options.side is not None:
        sides = {"tokenizer": tokenize, "ours": prepare, "first batch": prepare, "peer": peer}
        print(json.dumps(sides[options.side](options)))
        return
    base = base_rows(options.pairs)
    found = [measure(options, base, count) for count in options.rows]
    source = "FILE" if options.pairs else "worked sums"
    workers = options.workers or len(os.sched_getaffinity(0))
    common.heading(
        "Preparation of preference pairs",
        f"{__doc__.partition(chr(10))[2].strip()} Rows of {source}, BPE with 8192 tokens, {workers} processes on both sides."
        " Memory is the peak of resident memory, that of the main process with PyTorch. The time from the cache to the first"
        " batch has the check of the source, the opening of the store, the order of the epoch and a batch; not the imports.",
    )
    print(common.table([row for row, _ in found]))
    claims = [
        common.claim(f"{count:,} pairs: speed / TRL", "≥ 1x", f"{ratio:.2f}x", ratio >= 1)
        for count, (_, ratio) in zip(options.rows, found, strict=True)
        if ratio is not None
    ]
    if claims:
        print(common.table(claims))


if __name__ == "__main__":
    main()
