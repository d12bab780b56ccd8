"""`--ckpt_path auto`: the newest complete checkpoint of a run, which is named."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from lightning_align.cli import run
from lightning_align.training.newest import checkpoint_folders, choose_checkpoint, newest_checkpoint
from tests.cli.runs import checkpoint, config, fit

AUTO = ("--ckpt_path", "auto")


@pytest.fixture
def started(folder: Path, sft_rows: str) -> Path:
    """The checkpoint of a run of three steps."""
    return Path(checkpoint(fit("sft", folder, sft_rows, *AUTO)))


def aged(path: Path, seconds: float) -> Path:
    """Set the time of the last change, in seconds before that of now."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))
    return path


def test_a_run_starts_and_goes_on(folder: Path, sft_rows: str, caplog: pytest.LogCaptureFixture) -> None:
    first = fit("sft", folder, sft_rows, *AUTO)
    assert first.trainer.global_step == 3
    assert "auto finds no checkpoint: the run starts from the beginning" in caplog.text
    saved = checkpoint(first)
    second = fit("sft", folder, sft_rows, *AUTO, "--trainer.max_steps", "5")
    assert second.trainer.global_step == 5 and f"auto takes {saved} (step 3)" in caplog.text
    third = fit("sft", folder, sft_rows, *AUTO, "--trainer.max_steps", "6")
    assert third.trainer.global_step == 6 and "(step 5)" in caplog.text, "of the second version of the run"
    whole = fit("sft", folder, sft_rows, "--trainer.max_steps", "6")
    for name, value in whole.model.policy.state_dict().items():
        assert torch.equal(third.model.policy.state_dict()[name], value), name


def test_damaged_and_other_checkpoints_are_skipped_and_named(
    folder: Path, started: Path, sft_rows: str, pair_rows: str, caplog: pytest.LogCaptureFixture
) -> None:
    aged(started, 100)
    content = started.read_bytes()
    (started.parent / "cut.ckpt").write_bytes(content[: len(content) // 2])
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (started.parent / "flipped.ckpt").write_bytes(flipped)
    (started.parent / "empty.ckpt").touch()
    torch.save({"state_dict": {}}, started.parent / "bare.ckpt")
    other = fit("dpo", folder, pair_rows)
    shutil.copy(checkpoint(other), started.parent / "other.ckpt")
    (started.parent / "gone.ckpt").symlink_to(started.parent / "nowhere.ckpt")
    caplog.clear()
    again = fit("sft", folder, sft_rows, *AUTO, "--trainer.max_steps", "4")
    said = caplog.text
    assert again.trainer.global_step == 4 and f"auto takes {started} (step 3)" in said
    for name in ("cut", "flipped", "empty", "bare", "other"):
        assert f"{name}.ckpt" in said, name
    assert "is of a run of DPOModule" in said or "is of a run of lightning_align" in said


def test_the_checkpoint_of_a_requeued_job_counts(folder: Path, started: Path, sft_rows: str) -> None:
    aged(started, 100)
    requeued = Path(shutil.copy(started, "hpc_ckpt_1.ckpt"))
    os.utime(requeued)
    found = newest_checkpoint([Path("runs")], None, resumes=True)
    assert found.path == requeued and found.step == 3 and not found.skipped
    assert newest_checkpoint([Path("runs")], "runs", resumes=True).path == started


def test_a_torn_checkpoint_serves_validation_only(started: Path) -> None:
    content = torch.load(started, weights_only=True)
    key = next(key for key, value in content.items() if isinstance(value, dict) and "torn" in value)
    content[key]["torn"] = True
    torn = started.parent / "torn.ckpt"
    torch.save(content, torn)
    aged(started, 100)
    folders = [started.parent]
    assert newest_checkpoint(folders, None, resumes=False).path == torn
    resumed = newest_checkpoint(folders, None, resumes=True)
    assert resumed.path == started and "middle of an optimizer step" in resumed.skipped[0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_incomplete_sharded_checkpoint_is_skipped(tmp_path: Path) -> None:
    for name, complete in (("old", True), ("new", False)):
        made = tmp_path / f"{name}.ckpt"
        dcp.save({"a": torch.ones(2)}, checkpoint_id=made, no_dist=True)
        torch.save({"global_step": 7, "loops": {}}, made / "meta.pt")
        if not complete:
            (made / ".metadata").unlink()
    aged(tmp_path / "old.ckpt" / "meta.pt", 50)
    found = newest_checkpoint([tmp_path], None, resumes=True)
    assert found.path == tmp_path / "old.ckpt" and found.step == 7 and "is incomplete" in found.skipped[0]


def test_validate_takes_the_newest_and_needs_one(folder: Path, sft_rows: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["validate", "--config", config("sft", folder), "--data.validation", sft_rows, *AUTO]
    with pytest.raises(SystemExit, match=r"auto must find a checkpoint, but there is none in .*runs/sft"):
        run(arguments)
    saved = checkpoint(fit("sft", folder, sft_rows))
    caplog.clear()
    assert run(arguments) is not None
    assert f"auto takes {saved} (step 3)" in caplog.text


def test_ranks_take_the_choice_of_the_process_that_started_them(
    started: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"logger": {"class_path": "x.TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "sft"}}}
    first = choose_checkpoint(trainer, resumes=True)
    shutil.copy(started, started.parent / "later.ckpt")
    told = os.environ["LIGHTNING_ALIGN_CKPT_PATH"]
    assert choose_checkpoint(trainer, resumes=True).path == started.parent / "later.ckpt", "another command"
    monkeypatch.setenv("LIGHTNING_ALIGN_CKPT_PATH", told)
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_checkpoint(trainer, resumes=True) == first


def test_where_checkpoints_are_looked_for() -> None:
    trainer = {
        "default_root_dir": "root",
        "logger": [
            {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "dpo"}},
            {"class_path": "MLFlowLogger", "init_args": {"save_dir": "ml"}},
        ],
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept"}},
            {"class_path": "SelfPlayGeneration", "init_args": {"folder": "sets"}},
            {"class_path": "SampleLogger"},
        ],
    }
    found = checkpoint_folders(trainer)
    assert found == [Path(name) for name in ("root/checkpoints", "kept", "sets", "runs/dpo", "ml/lightning_logs")]
    assert checkpoint_folders({"logger": False}) == [Path("runs/unlogged/checkpoints")], "where such a run is"
    found = checkpoint_folders({"logger": False, "default_root_dir": "."})
    assert found == [Path("checkpoints")], "never the whole working directory"
    assert Path("lightning_logs") in checkpoint_folders({})
