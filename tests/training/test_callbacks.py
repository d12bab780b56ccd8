"""Callbacks: what they show can be read, and no rank waits for another."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lightning_align.training.callbacks import SampleLogger
from lightning_align.training.markdown import block
from tests.toys import tiny_palm


class Folder:
    """A trainer whose folder is agreed on by a broadcast, so that all ranks have to ask for it."""

    sanity_checking = False
    loggers = ()
    global_step = 1

    def __init__(self, path: Any) -> None:
        self.path, self.asked = path, 0
        tokenizer = SimpleNamespace(eos_id=0, decode=str)
        self.datamodule = SimpleNamespace(tokenizer=tokenizer, validation_prompts=lambda _: [([1, 2], "a", "b")])
        self.precision_plugin = SimpleNamespace(forward_context=lambda: pytest.MonkeyPatch.context())

    @property
    def log_dir(self) -> str:
        self.asked += 1
        return str(self.path)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_asks_for_the_folder_and_the_first_writes(rank: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    trainer: Any = Folder(tmp_path)
    module: Any = SimpleNamespace(policy=tiny_palm())
    SampleLogger(max_new_tokens=2).on_validation_epoch_end(trainer, module)
    assert trainer.asked == 1
    assert (tmp_path / "samples.jsonl").exists() == (rank == 0)


def test_shown_text_fits_the_page_and_loses_nothing() -> None:
    text = "word " * 60 + "\n\n  indented\n" + "x" * 300
    lines = block(text).split("\n")
    assert all(line.startswith("    ") and len(line) <= 114 for line in lines)
    assert "".join(line[4:] for line in lines) == text.replace("\n", "")
    assert block("") == "    (nothing)"
    assert block(" \n") == r"    ' \n'"
