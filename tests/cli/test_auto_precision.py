"""`--trainer.precision auto`: a measured precision, which the checkpoint holds."""

import logging
from pathlib import Path

import pytest

from lightning_align.cli import run
from lightning_align.training import auto_precision
from tests.cli.runs import checkpoint, config, fit
from tests.training.test_auto_precision import Told

AUTO = ("--trainer.precision", "auto")


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_resumed_run_takes_the_recorded_choice(
    folder: Path, sft_rows: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto_precision, "bf16_instructions", lambda: ["amx_bf16"])
    told = Told("bf16-mixed", monkeypatch)
    with caplog.at_level(logging.INFO):
        first = fit("sft", folder, sft_rows, *AUTO)
        assert first.trainer.precision == "bf16-mixed" and told.steps == 2
        assert "precision: auto" in (Path(first.trainer.log_dir or "") / "config.yaml").read_text()
        saved = checkpoint(first)

        told.precision = "32-true"
        monkeypatch.setattr(auto_precision, "bf16_instructions", list)  # on another machine
        caplog.clear()
        resumed = fit("sft", folder, sft_rows, *AUTO, "--trainer.max_steps", "4", "--ckpt_path", saved)
        assert resumed.trainer.precision == "bf16-mixed" and resumed.trainer.global_step == 4
        assert "precision auto: bf16-mixed (as in the checkpoint)" in caplog.text

        given = ["--config", config("sft", folder), "--data.validation", sft_rows, *AUTO]
        validated = run(["validate", *given, "--ckpt_path", saved])
        assert validated is not None and validated.trainer.precision == "bf16-mixed"
    assert told.steps == 2


def test_spin_is_tried_on_real_rows(folder: Path, sft_rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_precision, "bf16_instructions", lambda: ["amx_bf16"])
    told = Told("32-true", monkeypatch)
    callback = ("--trainer.callbacks+", "SelfPlayGeneration", "--trainer.callbacks.iterations", "1")
    cli = fit("spin", folder, sft_rows, *AUTO, *callback)
    assert told.steps == 2 and cli.trainer.global_step > 0
