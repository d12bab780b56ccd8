"""The link to the last checkpoint of a name."""

from pathlib import Path

import pytest

from lightning_align.cli import run
from lightning_align.training.newest import newest_checkpoint
from tests.cli.runs import fit


@pytest.fixture
def link(folder: Path) -> Path:
    return folder / "runs" / "sft" / "last.ckpt"


def saving(*extra: str) -> list[str]:
    return ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true", *extra]


def test_the_link_is_to_the_newest_run_and_can_be_resumed_and_exported(
    folder: Path, sft_rows: str, link: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fit("sft", folder, sft_rows, *saving())
    assert "version_0/checkpoints/last.ckpt (the newest of this name: runs/sft/last.ckpt)" in caplog.text
    assert not Path(link.readlink()).is_absolute()  # so that the folder can be moved
    fit("sft", folder, sft_rows, *saving("--ckpt_path", "runs/sft/last.ckpt", "--trainer.max_steps", "4"))
    assert link.resolve() == (folder / "runs/sft/version_1/checkpoints/last.ckpt").resolve()
    found = newest_checkpoint([folder / "runs"], folder, resumes=True)
    assert found.step == 4 and found.path is not None and not found.path.is_symlink()
    run(["export", "runs/sft/last.ckpt", "--output", "exported"])
    assert (folder / "exported" / "config.json").is_file()


def test_a_file_of_the_user_and_a_run_without_a_logger_are_left_alone(folder: Path, sft_rows: str, link: Path) -> None:
    link.parent.mkdir(parents=True)
    link.write_text("mine")
    fit("sft", folder, sft_rows, *saving())
    assert link.read_text() == "mine" and not link.is_symlink()
    fit("sft", folder, sft_rows, *saving("--trainer.logger", "false"))
    assert [path for path in folder.rglob("*") if path.is_symlink() and path.name == "last.ckpt"] == []


def test_a_dangling_link_is_replaced_and_a_run_without_last_makes_none(folder: Path, sft_rows: str, link: Path) -> None:
    fit("sft", folder, sft_rows)
    assert not link.is_symlink()
    link.symlink_to("nowhere.ckpt")
    fit("sft", folder, sft_rows, *saving())
    assert link.exists()
