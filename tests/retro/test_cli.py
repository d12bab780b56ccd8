"""Tests of the commands with the configurations in `configs/retro`."""

import json
import sys
from pathlib import Path

import pytest

from lightning_align.cli import AlignCLI, run
from lightning_align.data.tasks.facts import Facts
from tests.charts import lines_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "retro"
SMALL = [
    *("--model.init_args.backbone.init_args.decoder.init_args.dim", "16"),
    *("--model.init_args.backbone.init_args.encoder_dim", "16"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    return tmp_path


def config_of_few_facts(folder: Path) -> str:
    """Write a copy of facts.yaml with fewer facts."""
    text = (CONFIGS / "facts.yaml").read_text().replace("{role: ", "{num_facts: 24, num_held_out: 6, num_notes: 9, role: ")
    path = folder / "facts.yaml"
    path.write_text(text.replace("batch_size: 16", "batch_size: 8").replace("val_check_interval: 500", "val_check_interval: 4"))
    return str(path)


def test_fit_validate_predict(folder: Path) -> None:
    config = config_of_few_facts(folder)

    fitted = run(["fit", "--config", config, *SMALL, "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1"])
    assert isinstance(fitted, AlignCLI)
    fitted.trainer.save_checkpoint(folder / "facts.ckpt")
    metrics = fitted.trainer.callback_metrics
    assert {"val/bits_per_byte", "val/on/bits_per_byte", "val/off/bits_per_byte", "val/off/gain", "train/loss"} <= set(metrics)
    assert {"meta/val/documents", "meta/val/bytes_alpha_1.0"} <= set(metrics)
    charts = lines_of(fitted.trainer.log_dir)
    assert len(charts["bits per byte that neighbors save, 95 % interval"]) == 3
    assert all(charts.values()), charts

    common = ["--config", config, *SMALL, "--ckpt_path", str(folder / "facts.ckpt")]
    validated = run(["validate", *common])
    assert isinstance(validated, AlignCLI)
    again = validated.trainer.callback_metrics
    assert {f"val/{arm}/bits_per_byte" for arm in ("on", "off", "random", "shuffled")} <= set(again)
    assert float(again["val/off/bits_per_byte"]) == pytest.approx(float(metrics["val/off/bits_per_byte"]), abs=1e-5)

    task = Facts(num_facts=24, num_held_out=6)
    key, _ = task.facts()[-1]
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": task.prompt(key)}) + "\n")
    run(["predict", *common, "--data.init_args.predict", "prompts.jsonl", "--output", "out.jsonl"])
    (row,) = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(row["responses"]) == 1 and len(row["neighbors"][0]) == 1
    assert row["neighbors"][0][0]["read"][0]["document"] == f"fact/{key}"


@pytest.mark.parametrize("names", [["facts"], ["stdlib"], ["stdlib", "folder"]])
def test_each_configuration_parses(folder: Path, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text("text")
    with pytest.raises(SystemExit) as end:
        run(["fit", *(word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))), "--print_config"])
    assert end.value.code == 0
    assert f"database: .cache/retro/{names[-1]}" in capsys.readouterr().out
