"""The tokenizer is a part of the run: a checkpoint names it, and a run that starts from the checkpoint must have the same."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_align.calm.datamodule import CALMDataModule
from lightning_align.calm.module import CALMModule
from lightning_align.calm.spec import Augment
from lightning_align.data.tokenizer import ByteTokenizer, load_tokenizer, train_tokenizer
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.models.palm import PaLM
from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.sft.module import SFTModule
from lightning_align.spin.datamodule import SPINDataModule
from lightning_align.spin.module import SPINModule
from lightning_align.training.tokenizer import check_tokenizer, record_of, tokenizer_record, vocabulary_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
ROWS = [
    {"prompt": f"how many {n}", "response": f"{n} apples", "chosen": f"{n} apples", "rejected": f"{n} plums"} for n in range(6)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, keys in (("sft", ("prompt", "response")), ("pairs", ("prompt", "chosen", "rejected"))):
        lines = [json.dumps({key: row[key] for key in keys}) + "\n" for row in ROWS]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "other.jsonl").write_text(
        "".join(json.dumps({"text": f"zebra quartz {n} fjord"}) + "\n" for n in range(20)), encoding="utf-8"
    )
    train_tokenizer([str(folder / "sft.jsonl")], output=str(folder / "a.json"), vocab_size=270)
    train_tokenizer([str(folder / "other.jsonl")], output=str(folder / "b.json"), vocab_size=270)
    return folder


def palm() -> PaLM:
    torch.manual_seed(0)
    return PaLM(num_tokens=300, dim=16, depth=1, heads=2, dim_head=8)


def fit(module: Any, data: Any, folder: Path, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data, **options)
    return trainer


def sft(files: Path, folder: Path, tokenizer: str) -> SFTDataModule:
    return SFTDataModule(str(files / "sft.jsonl"), tokenizer=tokenizer, batch_size=2, cache_dir=str(folder / "cache"))


@pytest.fixture
def trained(files: Path, tmp_path: Path) -> str:
    """A checkpoint of SFT with the tokenizer a.json."""
    path = tmp_path / "sft.ckpt"
    fit(SFTModule(palm()), sft(files, tmp_path, str(files / "a.json")), tmp_path).save_checkpoint(path)
    return str(path)


def test_a_checkpoint_names_its_tokenizer(files: Path, trained: str) -> None:
    record = torch.load(trained, weights_only=True)["tokenizer"]
    tokenizer = load_tokenizer(str(files / "a.json"))
    assert record["name"] == str(files / "a.json")
    assert record["fingerprint"] == tokenizer.fingerprint and record["vocabulary"] == vocabulary_fingerprint(tokenizer)
    assert record_of(trained) == record


FOLLOWING: dict[str, Any] = {
    "sft": lambda files, path, options: (SFTModule(init_from=path), SFTDataModule(str(files / "sft.jsonl"), **options)),
    "dpo": lambda files, path, options: (DPOModule(init_from=path), DPODataModule(str(files / "pairs.jsonl"), **options)),
    "spin": lambda files, path, options: (SPINModule(init_from=path), SPINDataModule(str(files / "sft.jsonl"), **options)),
    "calm": lambda files, path, options: (
        CALMModule(path, [Augment(palm())]),
        CALMDataModule(str(files / "sft.jsonl"), **options),
    ),
}


@pytest.mark.parametrize("method", FOLLOWING)
def test_a_run_from_a_checkpoint_must_have_its_tokenizer(method: str, files: Path, trained: str, tmp_path: Path) -> None:
    """Forgotten, it would be bytes; another file of the same size has other tokens."""
    options: dict[str, Any] = {"batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    for wrong in ({}, {"tokenizer": str(files / "b.json")}):
        module, data = FOLLOWING[method](files, trained, {**options, **wrong})
        with pytest.raises(ValueError, match=r"is not the tokenizer that .*sft\.ckpt was trained with, .*a\.json"):
            fit(module, data, tmp_path)
    if method != "spin":  # which would play a whole iteration
        module, data = FOLLOWING[method](files, trained, {**options, "tokenizer": str(files / "a.json")})
        fit(module, data, tmp_path)


def test_a_resumed_run_must_have_the_tokenizer_of_its_checkpoint(files: Path, trained: str, tmp_path: Path) -> None:
    for wrong in ("bytes", str(files / "b.json")):
        with pytest.raises(ValueError, match=r"was trained with, .*a\.json"):
            fit(SFTModule(palm()), sft(files, tmp_path, wrong), tmp_path, ckpt_path=trained, weights_only=True)
    fit(SFTModule(palm()), sft(files, tmp_path, str(files / "a.json")), tmp_path, ckpt_path=trained, weights_only=True)
    # Without a data module there is nothing to compare.
    assert SFTModule.load_from_checkpoint(trained, weights_only=True).policy is not None


def test_the_same_tokens_with_another_end_are_a_warning(files: Path, tmp_path: Path) -> None:
    record = tokenizer_record(sft(files, tmp_path, str(files / "a.json")))
    assert record is not None
    pad = load_tokenizer(str(files / "a.json")).decode([0], skip_special=False)
    other = sft(files, tmp_path, f"{files / 'a.json'}?eos={pad}")
    with pytest.warns(UserWarning, match="other special tokens: a sequence begins with id 1 and ends with id 0, instead of"):
        check_tokenizer(record, other, source="x.ckpt")


def test_an_exported_folder_is_compared_by_its_tokens(files: Path, tmp_path: Path) -> None:
    """A file and the folder that it was exported to are the same tokenizer under two names."""
    folder = tmp_path / "export"
    folder.mkdir()
    tokenizer: Any = load_tokenizer(str(files / "a.json"))
    tokenizer.save(folder)
    record = record_of(folder)
    assert record is not None and record["vocabulary"] == tokenizer.vocabulary_fingerprint
    with pytest.raises(ValueError, match="is not the tokenizer"):
        check_tokenizer(record, sft(files, tmp_path, "bytes"), source=str(folder))


def test_what_has_no_record_is_not_compared(files: Path, tmp_path: Path) -> None:
    torch.save(palm().state_dict(), tmp_path / "state.pt")
    assert (
        record_of(tmp_path / "state.pt") is None and record_of(tmp_path / "gone.ckpt") is None and record_of(tmp_path) is None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tokenizer(None, sft(files, tmp_path, "bytes"), source="x")
        check_tokenizer({"name": "a", "fingerprint": "b", "vocabulary": "c"}, object(), source="x")
    assert tokenizer_record(None) is None
    assert vocabulary_fingerprint(ByteTokenizer()) == ByteTokenizer().vocabulary_fingerprint
    assert partial(SFTModule, palm)().initial_weights() == []
