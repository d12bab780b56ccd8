"""Damaged files of self-play: errors that name them, and parts that are generated again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.spin.runs import InterruptAfter, Interrupted, Keep, Noise, finish, interrupt_writes, start
from tests.toys import largest_difference, state_of


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)


PART = "train/part-00000.jsonl"
DAMAGE: dict[str, tuple[str, Any, str]] = {
    "empty weights": ("policy.safetensors", lambda p: p.write_bytes(b""), "policy.safetensors is damaged"),
    "short weights": ("policy.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-50]), "policy.safetensors is damaged"),
    "no weights": ("policy.safetensors", lambda p: p.write_text("weights"), "policy.safetensors is damaged"),
    "changed weights": ("policy.safetensors", flip, "policy.safetensors is damaged .its SHA-256 differs"),
    "other model": (
        "policy.safetensors",
        lambda p: save_file({"a": torch.ones(2)}, p, metadata=metadata_of(p)),
        "policy.safetensors is damaged",
    ),
    "list as identity": ("train/identity.json", lambda p: p.write_text("[]"), "Cannot read .*identity.json"),
    "binary identity": ("train/identity.json", lambda p: p.write_bytes(b"\xff\xfe"), "Cannot read .*identity.json"),
    "lost identity": ("train/identity.json", lambda p: p.unlink(), "identity.json is missing"),
    "empty part": (PART, lambda p: p.write_bytes(b""), "part-00000.jsonl has 0 rows, but 4 were expected"),
    "binary part": (PART, lambda p: p.write_bytes(b"\xff\xfe\n"), r"part-00000.jsonl:1 is not a row"),
    "short part": (PART, lambda p: p.write_bytes(p.read_bytes()[:-9]), r"part-00000.jsonl:4 is not a row"),
    "list as row": (PART, lambda p: p.write_text("[]\n"), r"part-00000.jsonl:1 is not a row .*not an object"),
    "row without logprob": (
        PART,
        lambda p: p.write_text(p.read_text().replace('"logprob"', '"lp"')),
        r"part-00000.jsonl:1 is not a row .*`logprob` must be a finite number, but is None",
    ),
    "nan": (
        PART,
        lambda p: p.write_text(p.read_text().replace('"real_logprob": -', '"real_logprob": NaN, "x": -')),
        r"part-00000.jsonl:1 is not a row .*`real_logprob` must be a finite number, but is nan",
    ),
    "text as token": (
        PART,
        lambda p: p.write_text(p.read_text().replace('"tokens": [', '"tokens": ["a", ')),
        r"part-00000.jsonl:1 is not a row .*`tokens` must be a list of token ids",
    ),
    "folder as part": (PART, lambda p: (p.unlink(), p.mkdir()), "part-00000.jsonl cannot be read"),
}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {**file.metadata(), "sha256": "other"}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped while iteration 1 generated."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        interrupt_writes(patch, 8)
        finish(folder, Keep(folder))
    shutil.copytree(folder / "sets", folder / "kept")
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_raise_errors_that_name_them(name: str, half: Path) -> None:
    shutil.rmtree(half / "sets")
    shutil.copytree(half / "kept", half / "sets")
    file, damage, message = DAMAGE[name]
    damage(half / "sets" / "iteration_1" / file)
    trainer, module, data = start(half, Noise())
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, data, ckpt_path=half / "within.ckpt")


def test_a_lost_part_is_generated_again_from_the_boundary(tmp_path: Path) -> None:
    _, module = finish(tmp_path / "whole")
    with pytest.raises(Interrupted):
        finish(tmp_path, InterruptAfter(6))
    root = tmp_path / "sets" / "iteration_1"
    part = root / PART
    text = part.read_text()
    part.unlink()
    with pytest.raises(ValueError, match=rf"part-00000.jsonl is missing. .*Resume from {root}/start.ckpt"):
        finish(tmp_path, resume=True)
    trainer, again, data = start(tmp_path)
    trainer.fit(again, data, ckpt_path=root / "start.ckpt")
    assert part.read_text() == text
    assert (root / "train" / "manifest.json").is_file()
    assert largest_difference(state_of(again.policy), state_of(module.policy)) == 0
    # The other parts are still those of the manifest when a lost one is generated again.
    part.unlink()
    flip(root / "train" / "part-00001.jsonl")
    trainer, again, data = start(tmp_path)
    with pytest.raises(ValueError, match=r"part-00001.jsonl was changed after it was written"):
        trainer.fit(again, data, ckpt_path=root / "start.ckpt")
