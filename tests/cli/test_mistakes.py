"""Mistakes in nested values: lists of callbacks, loggers, schedules, and settings that only the Trainer or a run finds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_align.cli import run
from lightning_align.console.advice import advise, mismatch, with_nearest
from lightning_align.data.tokenizer import load_tokenizer
from tests.cli.runs import config, write_rows

MODEL, DATA, TRAINER = ("model", "init_args"), ("data", "init_args"), ("trainer",)
CHECKPOINT = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}
NESTED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "callback": (
        TRAINER,
        {"callbacks": [CHECKPOINT, {"class_path": "SampleLoger", "init_args": {"max_new_tokens": 4}}]},
        "no class 'SampleLoger' for --trainer.callbacks; did you mean 'SampleLogger'?",
    ),
    "callback_key": (
        TRAINER,
        {"callbacks": [CHECKPOINT, {"class_path": "SampleLogger", "init_args": {"max_tokens": 4}}]},
        "SampleLogger has no argument 'max_tokens'; did you mean 'max_new_tokens'?",
    ),
    "callback_value": (
        TRAINER,
        {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": "often"}}]},
        "--trainer.callbacks.every_n_train_steps must be an integer or null, but got 'often'.",
    ),
    "callback_class": (
        TRAINER,
        {"callbacks": [{"class": "ModelCheckpoint"}]},
        "--trainer.callbacks has no key 'class'; did you mean 'class_path'?",
    ),
    "callback_needs": (
        TRAINER,
        {"callbacks": [{"class_path": "EarlyStopping"}]},
        "EarlyStopping needs 'monitor': give --trainer.callbacks.monitor VALUE",
    ),
    "logger": (
        TRAINER,
        {"logger": {"class_path": "TensorBordLogger", "init_args": {"save_dir": "runs"}}},
        "no class 'TensorBordLogger' for --trainer.logger; did you mean 'TensorBoardLogger'?",
    ),
    "logger_name": (TRAINER, {"logger": "wandb"}, "did you mean 'WandbLogger'?"),
    "loggers_key": (
        TRAINER,
        {"logger": [{"class_path": "CSVLogger", "init_args": {"savedir": "runs"}}]},
        "CSVLogger has no argument 'savedir'; did you mean 'save_dir'?",
    ),
    "flag": (TRAINER, {"enable_checkpointing": "maybe"}, "must be true or false or null, but got 'maybe'."),
    "schedule": (
        MODEL,
        {"lr_scheduler": {"class_path": "WarmupDecey", "init_args": {"total_steps": 9}}},
        "no class 'WarmupDecey' for --model.lr_scheduler; did you mean 'WarmupDecay'?",
    ),
    "schedule_key": (
        MODEL,
        {"lr_scheduler": {"class_path": "WarmupDecay", "init_args": {"total_step": 9}}},
        "WarmupDecay has no argument 'total_step'; did you mean 'total_steps'?",
    ),
    "schedule_value": (
        MODEL,
        {"lr_scheduler": {"class_path": "WarmupDecay", "init_args": {"total_steps": "many"}}},
        "no total_steps 'many'.",
    ),
    "schedule_start": (MODEL, {"lr_scheduler": "Cosine"}, "did you mean 'torch.optim.lr_scheduler.CosineAnnealingLR'"),
    "schedule_needs": (MODEL, {"lr_scheduler": {"class_path": "CosineAnnealingLR"}}, "CosineAnnealingLR needs 'T_max'"),
    "optimizer": (
        MODEL,
        {"optimizer": {"class_path": "torch.optim.AdmW", "init_args": {"lr": 1e-3}}},
        "no class 'torch.optim.AdmW' for --model.optimizer; did you mean 'torch.optim.AdamW'?",
    ),
    "optimizer_key": (
        MODEL,
        {"optimizer": {"class_path": "AdamW", "init_args": {"learning_rate": 1e-3}}},
        "AdamW has no argument 'learning_rate'; did you mean 'lr'?",
    ),
    "backbone": (
        MODEL,
        {"backbone": {"class_path": "lightning_align.PaML", "init_args": {}}},
        "no class 'lightning_align.PaML' for --model.backbone; did you mean 'PaLM'?",
    ),
    "backbone_module": (
        MODEL,
        {"backbone": {"class_path": "mymodels.Net"}},
        "there is no module 'mymodels'. Its file must be in the current folder or in PYTHONPATH.",
    ),
    "source": (DATA, {"train": [{"path": "rows.jsonl"}]}, "SourcePart has no argument 'path'; did you mean 'source'?"),
}


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines that a command line which cannot be parsed prints."""
    with pytest.raises(SystemExit) as stopped:
        run(["fit", *arguments])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 3, lines
    assert not re.search("Subtypes|NestedArg|NoneType|Namespace|<class|Unexpected", "\n".join(lines)), lines
    return lines


@pytest.mark.parametrize("name", NESTED)
def test_a_mistake_in_a_nested_value_is_answered_in_three_lines(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, change, expected = NESTED[name]
    path = Path(config("dpo", folder))
    content = yaml.safe_load(path.read_text())
    part = content
    for key in place:
        part = part[key]
    part.update(change)
    path.write_text(yaml.safe_dump(content))
    assert expected in answer(capsys, "--config", str(path))[0]


def test_options_without_their_group_are_completed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--config", config("dpo", folder)]
    for given, expected in (
        (["--lr", "1"], "did you mean '--model.optimizer.lr'?"),
        (["--optimizer.lr", "1"], "did you mean '--model.optimizer.lr'?"),
        (["--beta=1"], "did you mean '--model.beta'?"),
        (["--batch_size", "8"], "did you mean '--data.batch_size'?"),
        (["--max_steps", "8"], "did you mean '--trainer.max_steps'?"),
        (["-model.beta", "8"], "is written with two dashes: --model.beta"),
    ):
        assert expected in answer(capsys, *base, *given)[0], given
    assert "--model.backbone.help needs the class of --model" in answer(capsys, "--model.backbone.help", "PaLM")[0]
    (folder / "top.yaml").write_text("lr: 3\n")
    assert "did you mean 'model.init_args.optimizer.lr'?" in answer(capsys, "--config", "top.yaml")[0]


def test_files_that_are_no_configurations_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.yaml").touch()
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "--config empty.yaml is empty" in answer(capsys, "--config", "empty.yaml")[0]
    assert "--config list.yaml holds a list" in answer(capsys, "--config", "list.yaml")[0]
    assert f"--config {folder} is a folder" in answer(capsys, "--config", str(folder))[0]
    with pytest.raises(SystemExit, match=r"binary\.yaml must be YAML in UTF-8, but byte 0 is not text"):
        run(["fit", "--config", "binary.yaml"])


def test_what_a_run_finds_is_said_without_a_traceback(folder: Path, sft_rows: str, pair_rows: str) -> None:
    base = ["fit", "--config", config("dpo", folder, seed_everything=1), "--data.train", pair_rows, "--trainer.logger", "false"]
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/los"]
    for arguments, expected in (
        (["--trainer.accumulate_grad_batches", "0"], "`accumulate_grad_batches` must be 1 or more, but got 0"),
        (["--model.loss", '{"sigmoid": 1, "hingee": 1}'], "got 'hingee'; did you mean 'hinge'?"),
        (["--trainer.accelerator", "cudaa"], "did you mean 'cuda'?"),
        (["--data.tokenizer", "nowhere.json"], "tokenizer nowhere.json: there is no such file"),
        (["--data.tokenizer", pair_rows], "must be 'bytes', a .json file, a GGUF file or a folder"),
        ([*stop, "--trainer.max_epochs", "1"], "no metric 'train/los' is logged; did you mean 'train/loss'?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run([*base, *arguments])
        assert expected in str(stopped.value.code).splitlines()[0], (arguments, stopped.value.code)
        assert len(str(stopped.value.code).splitlines()) <= 3
    with pytest.raises(SystemExit, match=r"DPOModule cannot read the batches of SFTDataModule .* Use --data DPODataModule"):
        run([*base, "--data", "SFTDataModule", "--data.train", sft_rows])


def test_errors_that_are_no_mistakes_of_names_stay_as_they_are() -> None:
    class Own:
        pass

    assert mismatch(Own(), Own(), KeyError("tokens")) is None
    assert with_nearest("`beta` must be above 0, but got -1.") == "`beta` must be above 0, but got -1."
    assert advise(ModuleNotFoundError("Requirement 'x>=1' not met. HINT: Try running `pip install -U 'x>=1'`")).startswith(
        "Req"
    )


def test_columns_with_similar_names_are_offered(folder: Path) -> None:
    for row, expected in (
        ({"prompt": "q", "choosen": "a", "rejected": "b"}, "Set `columns: {chosen: choosen}`"),
        ({"Prompt": "q", "Chosen": "a", "Rejected": "b"}, "Set `columns: {chosen: Chosen, rejected: Rejected}`"),
        ({"prompt": "q", "answer_chosen": "a", "answer_rejected": "b"}, "{chosen: answer_chosen, rejected: answer_rejected}"),
    ):
        path = write_rows(folder / "rows.jsonl", [row])
        with pytest.raises(SystemExit) as stopped:
            run(["fit", "--config", config("dpo", folder), "--data.train", path])
        assert expected in str(stopped.value.code), json.dumps(row)


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    (folder / "weights").mkdir()
    with pytest.raises(ValueError, match="'weights' is a folder without a tokenizer"):
        load_tokenizer("weights")
