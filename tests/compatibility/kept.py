"""What is kept of a release, which its maker and the test that opens it must agree on."""

import csv
from pathlib import Path
from typing import Any

MODULES = {
    "sft": "SFTModule",
    "sft_lora": "SFTModule",
    "dpo_frozen": "DPOModule",
    "dpo_stored": "DPOModule",
    "dpo_moving": "DPOModule",
    "spin": "SPINModule",
    "calm": "CALMModule",
    "retro": "RETROModule",
}
"""A run of each, in the order in which they begin from each other."""
STEPS = {name: 2 for name in MODULES} | {"spin": 5}
"""Optimizer steps after which the checkpoint was taken: within an epoch, of self-play within the second iteration."""
FURTHER = 2
"""Steps that a run goes on for; the first of them tells of weights, rows and reference, the second of the optimizer too."""
TOKENS = [1, 52, 46, 52, 64, 53]
"""What logits are kept of: ids of the byte tokenizer."""


def numbers(logits: Any) -> list[list[float]]:
    """Some of the logits of a row: every 37th of each position."""
    kept: list[list[float]] = logits[0, :, ::37].tolist()
    return kept


def losses(folder: Path) -> list[float]:
    """The training losses of a run, in the order of its steps."""
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
