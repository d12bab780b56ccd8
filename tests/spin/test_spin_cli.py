"""Self-play through the command line: from a fine-tuned checkpoint to aligned weights, resumed and read back."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_align import SPINModule
from lightning_align.cli import run
from tests.charts import lines_of

ROOT = Path(__file__).resolve().parent.parent.parent
BACKBONE = {
    "class_path": "lightning_align.PaLM",
    "init_args": {"num_tokens": 259, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8},
}
TRAINER = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("name", ["arithmetic", "markov", "jsonl"])
def test_the_configurations_train_and_resume(name: str, folder: Path) -> None:
    sft = {
        "model": {"class_path": "SFTModule", "init_args": {"backbone": BACKBONE}},
        "data": {"class_path": "SFTDataModule", "init_args": {"train": "rows.jsonl", "batch_size": 4, "max_length": 32}},
        "trainer": {**TRAINER, "max_steps": 2, "logger": False, "default_root_dir": "sft"},
    }
    Path("sft.yaml").write_text(yaml.safe_dump(sft))
    started = run(["fit", "--config", "sft.yaml"])
    assert started is not None
    began = next(Path("sft").rglob("*.ckpt"))
    checkpoints = {"every_n_train_steps": 2, "save_last": True, "save_top_k": -1}
    callbacks = [
        {"class_path": "SelfPlayGeneration", "init_args": {"iterations": 2, "epochs": [1, 1]}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
    ]
    small = {
        "model": {"init_args": {"generation": {"max_new_tokens": 4, "batch_size": 5}}},
        "data": {"init_args": {"train": "rows.jsonl", "validation": "rows.jsonl", "batch_size": 4, "max_length": 32}},
        "trainer": {**TRAINER, "callbacks": callbacks},
    }
    Path("small.yaml").write_text(yaml.safe_dump(small))
    given = ["--config", str(ROOT / f"configs/spin/{name}.yaml"), "--config", "small.yaml", "--model.init_from", str(began)]
    cli = run(["fit", *given])
    assert cli is not None
    assert cli.trainer.global_step == 3 + 6
    log_dir = Path(str(cli.trainer.log_dir))
    assert (log_dir / "generations" / "iteration_1" / "validation" / "manifest.json").is_file()
    names = {"val/loss", "val/rewards/real", "val/rewards/margins", "val/nll", "train/tie_rate", "spin/train/eos_rate"}
    assert names <= cli.trainer.callback_metrics.keys()
    assert "meta/spin/iteration" in cli.trainer.callback_metrics
    charts = lines_of(log_dir)
    watched = "spin/train/kl_to_base" in cli.trainer.callback_metrics  # with `monitor_kl`
    assert all(charts.values()), charts
    assert ("by iteration: KL to the base model" in charts) == watched

    # Resume in the middle of the second iteration. The log folder is new, but the sets are read from the old one.
    (middle,) = log_dir.rglob("*step=6.ckpt")
    last = log_dir / "checkpoints" / "last.ckpt"
    resumed = run(["fit", *given, "--ckpt_path", str(middle)])
    assert resumed is not None
    assert resumed.trainer.global_step == 9
    ours, theirs = (c.model.policy.state_dict() for c in (cli, resumed))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    module = SPINModule.load_from_checkpoint(str(last), weights_only=True)
    assert isinstance(module, SPINModule)
    validated = run(["validate", *given, "--ckpt_path", str(last)])
    assert validated is not None
    assert "val/nll" in validated.trainer.callback_metrics
    run(["predict", *given, "--data.init_args.predict", "rows.jsonl", "--ckpt_path", str(last), "--output", "texts.jsonl"])
    assert len(Path("texts.jsonl").read_text().splitlines()) == 12


def test_the_form_of_the_published_trainer_trains() -> None:
    callbacks = [
        {"class_path": "SelfPlayGeneration", "init_args": {"iterations": 1, "epochs": 2}},
        {"class_path": "ReferenceUpdate", "init_args": {"alpha": 0.5, "every": 1, "update_after_step": 1, "inv_gamma": 2.0}},
    ]
    small = {
        "model": {"init_args": {"backbone": BACKBONE, "generation": {"max_new_tokens": 4, "batch_size": 5}}},
        "data": {"init_args": {"train": "rows.jsonl", "validation": "rows.jsonl", "batch_size": 2, "max_length": 32}},
        "trainer": {**TRAINER, "callbacks": callbacks, "logger": False},
    }
    Path("small.yaml").write_text(yaml.safe_dump(small))
    cli = run(["fit", "--config", str(ROOT / "configs/spin/per_step.yaml"), "--config", "small.yaml"])
    assert cli is not None
    assert cli.trainer.global_step == 2 * 6 / 2
    module = cli.model
    assert isinstance(module, SPINModule)
    assert (module.generation.top_p, module.generation.temperature, module.loss) == (0.9, 0.7, "sigmoid_norm")
    assert {"val/loss", "val/rewards/margins", "val/rewards/accuracies"} <= cli.trainer.callback_metrics.keys()
    assert not list(Path.cwd().rglob("part-*.jsonl"))


def test_a_checkpoint_of_another_shape_raises(folder: Path) -> None:
    torch.save({"state_dict": {"policy.token_emb.weight": torch.zeros(3, 3)}}, "other.ckpt")
    backbone = {"class_path": "SPINModule", "init_args": {"backbone": BACKBONE, "init_from": "other.ckpt"}}
    Path("spin.yaml").write_text(yaml.safe_dump({"model": backbone, "trainer": {**TRAINER, "max_epochs": -1}}))
    data = ["--data", "SPINDataModule", "--data.train", "rows.jsonl"]
    with pytest.raises(SystemExit, match=r"other.ckpt is of another model"):
        run(["fit", "--config", "spin.yaml", *data])
