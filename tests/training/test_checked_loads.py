"""A damaged checkpoint is refused in one line, by every command of the Trainer, before anything is restored from it."""

import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save_file

from lightning_align.calm.module import CALMModule
from lightning_align.dpo.module import DPOModule
from lightning_align.sft.module import SFTModule
from lightning_align.training.checked_loads import check_content
from tests.training.places import Run, build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    return Run("sft", folder, max_steps=2, limit_val_batches=0).save(folder / "good.ckpt")


def refusal(path: Path, *, command: str = "fit", method: str = "sft") -> str:
    """What is said when a command reads a checkpoint."""
    module, data, own = build(method, path.parent)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=3, callbacks=own, default_root_dir=path.parent, **quiet)
    with pytest.raises(ValueError) as found:
        getattr(trainer, command)(module, data, ckpt_path=path, weights_only=True)
    return str(found.value)


def write(kind: str, saved: Path, path: Path) -> None:
    whole = saved.read_bytes()
    if kind == "flipped":
        with zipfile.ZipFile(saved) as file:
            largest = max(file.infolist(), key=lambda entry: entry.file_size)
        at = largest.header_offset + 2000
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif kind == "shorter":
        with zipfile.ZipFile(saved) as file, zipfile.ZipFile(path, "w") as new:
            largest = max(file.infolist(), key=lambda entry: entry.file_size)
            for entry in file.infolist():
                new.writestr(entry.filename, file.read(entry)[: -4 if entry == largest else None])
    elif kind == "code":
        torch.save({**torch.load(saved, weights_only=True), "extra": Path("x")}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "weights":
        save_file({"x": torch.ones(2)}, path)
    else:
        path.write_bytes({"empty": b"", "byte": whole[:1], "cut": whole[:-1], "text": b"hello\n" * 9}[kind])


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("empty", "no file of torch"),
        ("byte", "no file of torch"),
        ("cut", "its end is missing"),
        ("text", "no file of torch"),
        ("flipped", "checksum of .* is wrong"),
        ("shorter", r"a tensor in it must have \d+ bytes, and has"),
        ("code", r"it names pathlib\.\w*Path, and a checkpoint holds tensors and primitive types only"),
        ("folder", "is a folder"),
        ("pipe", "is no file"),
        ("weights", "a safetensors file, which holds weights only"),
    ],
)
def test_a_damaged_file(kind: str, reason: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.ckpt"
    write(kind, saved, path)
    said = refusal(path, command="validate" if kind in ("flipped", "code") else "fit")
    assert said.startswith(f"checkpoint {path} ") and "\n" not in said
    with pytest.raises(ValueError) as found:
        SFTModule.load_from_checkpoint(path, weights_only=True)
    for message in (said, str(found.value)):
        assert re.search(reason, message), message


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "list": (lambda content: [content], "holds a list"),
    "state dict": (lambda content: content["state_dict"], "not written by a Trainer"),
    "version": (lambda content: {**content, "pytorch-lightning_version": 3}, "its pytorch-lightning_version is of type int"),
    "step": (lambda content: {**content, "global_step": "2"}, "its global_step is of type str"),
    "callbacks": (lambda content: {**content, "callbacks": [1]}, "its callbacks is of type list"),
    "no loops": (lambda content: {name: value for name, value in content.items() if name != "loops"}, "place of the run"),
    "loops": (lambda content: {**content, "loops": {"fit_loop": {}}}, "place of the run"),
    "no weights": (lambda content: {**content, "state_dict": None}, "its state_dict is of type NoneType"),
    "text": (lambda content: {**content, "state_dict": {"a": "b"}}, "a in it is of type str"),
    "sparse": (lambda content: {**content, "state_dict": {"a": torch.eye(2).to_sparse()}}, "a in it is sparse"),
    "meta": (lambda content: {**content, "state_dict": {"a": torch.eye(2, device="meta")}}, "a in it has no values"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_content_of_another_kind(name: str, saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    check_content(content, saved, TrainerFn.FITTING)
    change, reason = CHANGES[name]
    with pytest.raises(ValueError, match=reason) as found:
        check_content(change(content), saved, TrainerFn.FITTING)
    assert str(saved) in str(found.value) and "\n" not in str(found.value)


def test_states_of_another_optimizer_and_a_damaged_place(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=True)
    states = content["optimizer_states"]
    other = {number: {**state, "exp_avg": torch.zeros(3)} for number, state in states[0]["state"].items()}
    for name, changed, reason in (
        ("none", {"optimizer_states": []}, "states of 0 optimizers, and the run has 1"),
        ("shape", {"optimizer_states": [{**states[0], "state": other}]}, r"weights of the shape \(3,\) instead of"),
        ("place", {"place": {"epoch": "x"}}, "its place in the run is incomplete"),
    ):
        torch.save({**content, **changed}, tmp_path / f"{name}.ckpt")
        assert re.search(reason, refusal(tmp_path / f"{name}.ckpt"))


def test_a_run_of_another_method(saved: Path, tmp_path: Path) -> None:
    """Its weights can be evaluated and begun from, but another method cannot go on with it."""
    link = tmp_path / "sft.ckpt"
    link.symlink_to(saved)
    said = refusal(link, method="dpo")
    assert "is of a run of SFTModule, which a DPOModule cannot resume" in said and "init_from" in said
    with pytest.raises(ValueError, match=r"is of a run of SFTModule, not of DPOModule\. Use SFTModule\.load_from_checkpoint"):
        DPOModule.load_from_checkpoint(saved, weights_only=True)


def test_arguments_that_a_class_does_not_take(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["hyper_parameters"]["betta"] = 0.2
    torch.save(content, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match=r"later.ckpt has arguments that SFTModule does not take: betta\. Load"):
        SFTModule.load_from_checkpoint(tmp_path / "later.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="load_from_checkpoint has arguments that SFTModule does not take: lr"):
        SFTModule.load_from_checkpoint(saved, weights_only=True, lr=0.1)
    # The checkpoint of a composition has arguments of its base class, which it does not take.
    path = Run("calm", tmp_path, max_steps=1, limit_val_batches=0).save(tmp_path / "calm.ckpt")
    with pytest.raises(ValueError, match=r"load_from_checkpoint has arguments that CALMModule does not take: lr\. Leave"):
        CALMModule.load_from_checkpoint(path, weights_only=True, lr=0.1)
    with pytest.raises(ValueError, match="`anchor` must be a model"):
        CALMModule.load_from_checkpoint(path, weights_only=True)
    module = SFTModule.load_from_checkpoint(saved, map_location="cpu", strict=True, weights_only=True, dropout=True)
    assert not module.dropout.off


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_run_in_another_precision_goes_on_with_a_warning(precision: str, saved: Path, tmp_path: Path) -> None:
    def resumed(command: str, precision: str) -> list[str]:
        module, data, own = build("sft", tmp_path)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="cpu", max_steps=3, callbacks=own, default_root_dir=tmp_path, precision=precision, **quiet
        )
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            getattr(trainer, command)(module, data, ckpt_path=saved, weights_only=True)
        return [str(each.message) for each in found if "precision" in str(each.message)]

    said = [text for text in resumed("fit", precision) if "is of a run with precision 32-true" in text]
    assert len(said) == 1 and f"this run has {precision}. Training goes on, but not as it would have" in said[0]
    assert not [text for text in [*resumed("validate", precision), *resumed("fit", "32-true")] if "is of a run" in text]


def test_the_format_before_torch_1_6_is_read(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    module = SFTModule.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    different = {name: value - content["state_dict"][name] for name, value in module.state_dict().items()}
    different = {
        name: (value.isnan().sum(), value.abs().max()) for name, value in different.items() if not bool((value == 0).all())
    }
    assert not different, different
