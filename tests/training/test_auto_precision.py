"""The precision that is measured at the start of a run, and what the measurement leaves as it was."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_align.sft.module import SFTModule
from lightning_align.training import auto_precision
from lightning_align.training.auto_precision import AutoPrecision, Choice, bf16_instructions, faster
from tests.toys import split, state_of, tiny_palm
from tests.training.runs import SFT_BATCH, loader, trainer
from tests.training.test_precision import CASES, SGD, fit_module

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
METHODS = ("sft", "sft-lora", "sft-dropout", "dpo-sigmoid", "dpo-stored", "spin-iterate", "calm", "calm-all-stored", "retro")


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16."""
    monkeypatch.setattr(auto_precision, "bf16_instructions", lambda: ["amx_bf16"])


class Told:
    """In place of the measurement: takes a step both ways, and chooses what it is told."""

    def __init__(self, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.precision, self.steps = precision, 0
        monkeypatch.setattr(auto_precision, "faster", self)

    def __call__(self, step: Callable[[], Any]) -> Choice:
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                step()
            self.steps += 1
        return Choice(self.precision, "told")


class Random(Callback):
    """Keeps a random number of the beginning of the training."""

    def on_train_start(self, *_: Any) -> None:
        self.number = float(torch.rand(()))


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [(2.0, 1.0, "bf16-mixed"), (1.0, 2.0, "32-true"), (1.0, 0.99, "32-true")],
    ids=["faster", "slower", "no gain"],
)
def test_the_precision_of_the_lower_median_is_taken(float32: float, bfloat16: float, chosen: str) -> None:
    product, now, dtypes = torch.ones(2, 2), 0.0, list[torch.dtype]()

    def step() -> None:
        nonlocal now
        dtypes.append((product @ product).dtype)
        # The warm-up is slow, and one of the others.
        slow = len(dtypes) <= 2 or len(dtypes) == 5
        now += {torch.float32: float32, torch.bfloat16: bfloat16}[dtypes[-1]] * (4 if slow else 1)

    choice = faster(step, clock=lambda: now)
    assert dtypes == [torch.float32, torch.bfloat16] * 4
    taken, other = sorted([float32, bfloat16], reverse=chosen == "32-true" and float32 > bfloat16)
    left = "bf16-mixed" if chosen == "32-true" else "32-true"
    if (float32, bfloat16) == (1.0, 0.99):  # too little is gained
        taken, other = float32, bfloat16
    assert str(choice) == f"precision auto: {chosen} ({taken:.3g} s a step; {left} {other:.3g} s)"


def test_slow_steps_are_tried_twice_only() -> None:
    calls = []
    faster(lambda: calls.append(1), clock=lambda: 100.0 * len(calls))
    assert len(calls) == 4


@pytest.mark.parametrize("name", METHODS)
def test_a_trial_leaves_the_run_as_it_was(
    name: str, tmp_path: Path, bf16: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told, plain, tried = Told("32-true", monkeypatch), Random(), Random()
    expected = fit_module(CASES[name], "32-true", tmp_path / "plain", plain)
    assert told.steps == 0
    with caplog.at_level(logging.INFO):
        got = fit_module(CASES[name], None, tmp_path / "tried", AutoPrecision(), tried)  # type: ignore[arg-type]
    assert "precision auto: 32-true (told)" in caplog.text
    assert told.steps == 2 and tried.number == plain.number
    before, after = state_of(expected), state_of(got)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    files = [{path.name for path in (tmp_path / run).rglob("*")} for run in ("plain", "tried")]
    assert files[0] == files[1]  # nothing is stored by the trial


def test_what_is_chosen_is_the_precision_of_the_run(tmp_path: Path, bf16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Told("bf16-mixed", monkeypatch)
    expected = fit_module(CASES["dpo-stored"], "bf16-mixed", tmp_path / "given")
    got = fit_module(CASES["dpo-stored"], None, tmp_path / "chosen", AutoPrecision())  # type: ignore[arg-type]
    assert got.trainer.precision == "bf16-mixed"
    before, after = state_of(expected), state_of(got)
    assert all(torch.equal(before[key], after[key]) for key in before)
    # The log-probs that it stores are those of this precision, too.
    assert [p.name for p in (tmp_path / "given" / "cache").iterdir()] == [
        p.name for p in (tmp_path / "chosen" / "cache").iterdir()
    ]


def test_a_processor_without_the_instructions_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told("bf16-mixed", monkeypatch)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    assert bf16_instructions() == []
    with caplog.at_level(logging.INFO):
        module = fit_module(CASES["sft"], None, tmp_path, AutoPrecision())  # type: ignore[arg-type]
    assert told.steps == 0 and module.trainer.precision == "32-true"
    assert "precision auto: 32-true (this processor has no instructions for bfloat16)" in caplog.text
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "l2_cache_size": 1})
    assert bf16_instructions() == ["avx512_bf16"]


def test_rank_0_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_precision, "of_first_rank", lambda value: Choice("bf16-mixed", f"not {value.precision}"))
    module = fit_module(CASES["sft"], None, tmp_path, AutoPrecision())  # type: ignore[arg-type]
    assert module.trainer.precision == "bf16-mixed"


class NeedsTrainer(SFTModule):
    """A module whose step reads what only a Trainer has."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.trainer.callback_metrics is not None
        return super().training_step(batch, batch_idx)


def test_a_step_that_cannot_be_tried_is_said(tmp_path: Path, bf16: None, caplog: pytest.LogCaptureFixture) -> None:
    module = NeedsTrainer(tiny_palm(), optimizer=SGD)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, max_steps=1, callbacks=[AutoPrecision()]).fit(module, loader(split(SFT_BATCH, 4)))
    assert "32-true (a step cannot be tried apart from the run: NeedsTrainer needs a Trainer" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "bf16-mixed"}, "the Trainer has precision 'bf16-mixed'. Leave it out"),
        ({"strategy": L.pytorch.strategies.ModelParallelStrategy(data_parallel_size=1)}, "the strategy is ModelParallel"),
    ],
    ids=["a precision too", "sharded"],
)
def test_what_cannot_be_chosen_is_refused(tmp_path: Path, arguments: Any, message: str) -> None:
    made = trainer(tmp_path, callbacks=[AutoPrecision()], **arguments)
    with pytest.raises(ValueError, match=message):
        AutoPrecision().setup(made, SFTModule(tiny_palm()), "fit")


def test_a_run_goes_on_in_the_precision_of_its_checkpoint(tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    torch.save({"state_dict": {}, "callbacks": {"AutoPrecision": {"precision": "bf16-mixed"}}}, path)
    callback = AutoPrecision(path)
    callback.setup(trainer(tmp_path, callbacks=[callback]), SFTModule(tiny_palm()), "fit")
    callback.load_state_dict({"precision": "bf16-mixed"})
    with pytest.raises(ValueError, match=r"takes bf16-mixed here, but .* in 32-true. Give the checkpoint to the callback"):
        callback.load_state_dict({"precision": "32-true"})
