"""SFT steps on a CPU: freed memory kept by the process, the default here, against memory returned to the system.

Each run has its own process. An empty LD_PRELOAD makes the library leave the allocator's settings alone.
"""

import argparse
import json
import logging
import os
import warnings

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks import common
from lightning_align import PaLM, SFTModule
from lightning_align.runtime.memory import CHOSEN

VOCABULARY, WIDTH, DEPTH, ROWS, STEPS = 256, 256, 4, 16, 6
LENGTHS = (128, 512)


def fit(length: int) -> dict[str, float]:
    """The median time of a step, and the peak memory of the process."""
    torch.manual_seed(0)
    rows = torch.randint(2, VOCABULARY, (ROWS, length))
    targets = (torch.arange(length) > 0).expand_as(rows)
    batch = {"tokens": rows, "mask": torch.ones_like(targets), "targets": targets}
    clock = common.Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    module = SFTModule(PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=4, dim_head=64))
    trainer.fit(module, DataLoader([batch] * (STEPS + 1), batch_size=None))  # type: ignore[arg-type]
    return {"seconds": common.median(t.seconds for t in clock.timings[1:]), "peak": common.peak()}


def report(rounds: int, threads: int) -> None:
    """Print the section."""
    common.heading(
        "Keeping freed memory",
        f"An SFT step under the Trainer on a CPU: {ROWS} rows, width {WIDTH}, depth {DEPTH}, vocabulary {VOCABULARY}, "
        f"float32, {threads} threads. Runs of {STEPS} steps, each in its own process; {rounds} per side, alternating; medians.",
    )
    for name in CHOSEN:
        os.environ.pop(name, None)
    table = []
    for length in LENGTHS:
        runs: dict[str, list[dict[str, float]]] = {"kept": [], "returned": []}
        for _ in range(rounds):
            for side, found in runs.items():
                if side == "returned":
                    os.environ["LD_PRELOAD"] = ""
                found.append(common.in_subprocess(__file__, "--length", str(length), "--threads", str(threads)))
                os.environ.pop("LD_PRELOAD", None)
        cells: dict[str, str] = {"tokens per row": str(length)}
        for side, found in runs.items():
            cells[f"{side}, s/step"] = f"{common.median(run['seconds'] for run in found):.3f}"
            cells[f"{side}, MiB"] = f"{common.median(run['peak'] for run in found) / 2**20:,.0f}"
        pairs = list(zip(runs["kept"], runs["returned"], strict=True))
        for what, key in (("time", "seconds"), ("memory", "peak")):
            cells[f"{what} ratio"] = f"{common.median(kept[key] / back[key] for kept, back in pairs):.2f}"
        table.append(cells)
    print(common.table(table))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, help="run once with rows of this length and print JSON")
    arguments = parser.parse_args()
    if arguments.length is None:
        report(arguments.rounds, arguments.threads)
        return
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    print(json.dumps(fit(arguments.length)))


if __name__ == "__main__":
    main()
