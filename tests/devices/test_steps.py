"""Fit, validate and predict of every method on a pretended GPU: no tensor on the wrong device, and few waits for it.

A budget is the number of times that the host may wait for the device: per training step after the first, per validation batch
after the first, and per batch of prompts or pairs that is predicted. It may only become smaller.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import lightning_align as la
from tests.devices.cases import STEPS, Case, base, calm, dpo, llama, retro, run, sft, spin
from tests.devices.pretended import PretendedGPU

pytestmark = [
    pytest.mark.filterwarnings("ignore:The loss has been called"),
    pytest.mark.filterwarnings("ignore:.*documents of validation have near-duplicates"),
    pytest.mark.filterwarnings("ignore:the first batch, where the policy should still equal its reference"),
]


class Budget(NamedTuple):
    """The largest numbers of waits."""

    step: int = 0
    validation: int = 0
    prediction: int = 3
    """For prompts: the numbers of the rows, and the drawn tokens every eight of nine tokens."""
    epochs: int = 1
    """The steps of the last epoch count."""


PAIRS = Budget(prediction=2)  # floats and integers
BASIC: dict[str, tuple[Callable[[Path], Case], Budget]] = {
    "sft": (sft, Budget()),
    "dpo": (dpo, PAIRS),
    "dpo stored": (lambda folder: dpo(folder, reference="stored"), PAIRS),
    "dpo moving": (lambda folder: dpo(folder, la.ReferenceUpdate(alpha=0.5, every=1), reference="moving"), PAIRS),
    "spin": (spin, Budget()),
    "spin ema": (lambda folder: spin(folder, opponent="ema"), Budget()),
    # The rows and their numbers, and twice the drawn tokens.
    "spin per step": (lambda folder: spin(folder, generate="per_step"), Budget(step=4, validation=4)),
    "calm": (calm, Budget()),
    # The prompts' lengths, and twice the tokens to search for.
    "retro": (retro, Budget(prediction=6)),
}
OPTIONS: dict[str, tuple[Callable[[Path], Case], Budget]] = {
    "sft packed": (lambda folder: sft(folder, packing=True), Budget()),
    "sft lora": (lambda folder: sft(folder, **base(folder)), Budget()),
    # transformers looks for packed rows in each forward pass. Before prediction, its cache is tried.
    "sft llama": (lambda folder: sft(folder, backbone=llama()), Budget(step=1, validation=1, prediction=17)),
    "dpo ld wpo": (lambda folder: dpo(folder, ld_alpha=0.5, confidence_weighting=True), PAIRS),
    "dpo lora": (lambda folder: dpo(folder, **base(folder)), PAIRS),
    "dpo lora moving": (
        lambda folder: dpo(folder, la.ReferenceUpdate(alpha=0.5, every=1), reference="moving", **base(folder)),
        PAIRS,
    ),
    # Which prompts come first, and their tokens and lengths.
    "dpo monitor": (
        lambda folder: dpo(folder, la.PreferenceMonitor(num_prompts=2, max_new_tokens=4), la.SampleLogger(max_new_tokens=4)),
        Budget(validation=3, prediction=2),
    ),
    "dpo orpo": (lambda folder: dpo(folder, loss="orpo"), PAIRS),
    "spin mixture": (lambda folder: spin(folder, opponent="mixture", monitor_kl=True), Budget()),
    "spin lora": (lambda folder: spin(folder, opponent="mixture", **base(folder)), Budget()),
    "calm prefix": (lambda folder: calm(folder, augment={"alignment": "prefix"}), Budget()),
    # Beside the numbers and two looks, once per token of all rows, whose text the augment reads.
    "calm own tokens": (lambda folder: calm(folder, augment={"tokens": "own"}), Budget(prediction=12)),
    "calm maps": (lambda folder: calm(folder, attention_maps=True), Budget()),
    "calm all tokens": (lambda folder: calm(folder, loss_on="all"), Budget()),
    # In the first epoch all rows are new. They are read from the device and written to a file.
    "calm stored, new rows": (lambda folder: calm(folder, store_states=str(folder / "states")), Budget(step=8)),
    "calm stored": (lambda folder: calm(folder, store_states=str(folder / "states")), Budget(epochs=2)),
    "retro fixed neighbors": (lambda folder: retro(folder, vary_neighbors=False), Budget(prediction=6)),
}
RUNS = [(name, "32-true") for name in (BASIC | OPTIONS)]
RUNS += [(name, precision) for precision in ("bf16-mixed", "bf16-true") for name in BASIC]


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_steps_on_a_device(name: str, precision: str, tmp_path: Path) -> None:
    case, budget = (BASIC | OPTIONS)[name]
    with PretendedGPU() as device:
        waits = run(case, tmp_path, device, precision=precision, epochs=budget.epochs)
    assert len(waits.steps) == STEPS * budget.epochs and len(waits.validation) == 4 and waits.prediction
    for found in waits.steps[1 - STEPS :]:
        assert sum(found.values()) <= budget.step, found
    # In `fit`, the second batch. `validate` begins with moving the module.
    for found in waits.validation[1::2]:
        assert sum(found.values()) <= budget.validation, found
    assert sum(waits.prediction.values()) <= budget.prediction, waits.prediction
