"""Whatever the end of a run would refuse to export is refused before its first step."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_align import (
    DPODataModule,
    DPOModule,
    ExportModel,
    GenerationConfig,
    LoRAConfig,
    PretrainedLM,
    SFTDataModule,
    SFTModule,
)
from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.models import folders
from lightning_align.models.folders import check_writable
from lightning_align.models.formats import whole_weights, write_model
from tests.toys import tiny_palm

QUIET: dict[str, Any] = {
    **{name: False for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")},
    "accelerator": "cpu",
    "max_steps": 1,
    "log_every_n_steps": 1,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}
    for name, keys in {"rows": ("prompt", "response"), "pairs": ("prompt", "chosen", "rejected")}.items():
        Path(f"{name}.jsonl").write_text(json.dumps({key: row[key] for key in keys}) + "\n")
    return tmp_path


class Steps(L.Callback):
    """Counts the batches that a run has trained on."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1


def fit(module: L.LightningModule, export: ExportModel, data: Any = None) -> int:
    """Run a step, and return how many batches were begun even if the run raises."""
    steps = Steps()
    try:
        kind: Any = DPODataModule("pairs.jsonl") if isinstance(module, DPOModule) else SFTDataModule("rows.jsonl")
        L.Trainer(**QUIET, callbacks=[export, steps]).fit(module, data or kind)
    except BaseException:
        assert steps.count == 0, "refused only after the first step"
        raise
    return steps.count


class Small(nn.Module):
    """A language model of a user."""

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.init_args: dict[str, Any] = {"width": width, "scale": scale}
        self.embed, self.head, self.scale = nn.Embedding(259, width), nn.Linear(width, 259), scale

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(tokens).cumsum(1)) * self.scale
        return logits


class Forgetful(Small):
    """Forgets a setting that no weight shows."""

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__(width, scale)
        self.init_args = {"width": width}


class OtherSize(Small):
    """Forgets its width."""

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__(width, scale)
        self.init_args = {"scale": scale}


class Demanding(Small):
    """Needs an argument that it does not keep."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__(width, scale)
        self.init_args = {"width": width}


class NotJson(Small):
    """Has an argument that is an object."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(width)
        self.init_args = {"width": width, "dtype": dtype}


class Unnamed(Small):
    """Does not say how it is built."""

    def __init__(self) -> None:
        super().__init__()
        del self.init_args


class WithState(Small):
    """Has a state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def _local() -> nn.Module:
    class Local(Small):
        pass

    return Local()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Unnamed, "must have `init_args`, from which it can be rebuilt, but is a Unnamed without them"),
        (lambda: Forgetful(scale=3.0), "`init_args` of Forgetful must rebuild it, but do not .*logits differ"),
        (lambda: OtherSize(width=4), "`init_args` of OtherSize must rebuild it, but do not .*of another model"),
        (lambda: Demanding(8, 1.0), "`init_args` of Demanding must rebuild it, but do not .*missing 1 required"),
        (NotJson, "`init_args` of NotJson must be values that JSON can hold"),
        (WithState, "must be tensors, but _extra_state of WithState is not"),
        (_local, r"must be importable as .*<locals>\.Local, but is not"),
    ],
    ids=["no init_args", "a lost setting", "another shape", "a lost argument", "an object", "extra state", "local class"],
)
def test_a_class_that_cannot_be_written(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(SFTModule(make()), ExportModel("out"))
    assert not Path("out").exists()


def test_a_class_that_can_be_written_is_not_refused() -> None:
    torch.manual_seed(0)
    assert fit(SFTModule(Small(width=4, scale=3.0)), ExportModel("out")) == 1
    assert (Path("out") / "model.safetensors").is_file()
    palm = tiny_palm(num_tokens=259)
    write_model(palm, whole_weights(palm), "start")
    module = SFTModule(init_from="start", lora=LoRAConfig(rank=2))
    assert fit(module, ExportModel("out")) == 1  # over the earlier export
    assert fit(module, ExportModel("adapters", adapter_only=True)) == 1


def _file() -> str:
    Path("taken").write_text("")
    return "taken"


def _below_a_file() -> str:
    return f"{_file()}/out"


def _other_files() -> str:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("")
    return "mine"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_file, "must be a folder, but taken is a file"),
        (_below_a_file, "must be a folder that can be written, but taken/out is not"),
        (_other_files, "must be empty or contain an earlier export"),
        (lambda: "x" * 300, "must be a folder that can be written.*File name too long"),
        (lambda: "/proc/nowhere/out", "must be a folder that can be written, but /proc/nowhere/out is not"),
    ],
    ids=["file", "below a file", "other files", "long name", "read-only"],
)
@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_folder_that_cannot_be_written(make: Callable[[], str], message: str, adapter_only: bool) -> None:
    palm = tiny_palm(num_tokens=259)
    write_model(palm, whole_weights(palm), "start")
    name = make()
    before = sorted(Path().rglob("*"))
    module = SFTModule(init_from="start", lora=LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=message):
        fit(module, ExportModel(name, adapter_only=adapter_only))
    left = {path for path in set(Path().rglob("*")) - set(before) if ".cache" not in path.parts}
    assert left <= {Path("ledger.json")}


def test_a_disk_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="must have room for the export"):
        fit(SFTModule(tiny_palm(num_tokens=259)), ExportModel("deep/out"))
    assert not Path("deep").exists()
    check_writable("deep/out", 999)
    assert not Path("deep").exists(), "the check leaves nothing"


def test_a_read_only_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folders.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"must be a folder that can be written, but out is not \(Read-only file system\)"):
        fit(SFTModule(tiny_palm(num_tokens=259)), ExportModel("out"))


def test_the_default_folder_is_checked_too() -> None:
    Path("export").mkdir()
    Path("export/thesis.tex").write_text("")
    with pytest.raises(ValueError, match="must be empty or contain an earlier export"):
        fit(SFTModule(tiny_palm(num_tokens=259)), ExportModel())


def test_a_tokenizer_that_cannot_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, folder: Any) -> None:
        raise ValueError("the tokenizer cannot be saved")

    monkeypatch.setattr(ByteTokenizer, "save", fail)
    with pytest.raises(ValueError, match="the tokenizer cannot be saved"):
        fit(SFTModule(tiny_palm(num_tokens=259)), ExportModel("out"))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_an_end_token_that_nothing_knows() -> None:
    from torch.utils.data import DataLoader

    from tests.toys import token_batch

    module = SFTModule(tiny_palm(), generation=GenerationConfig(eos_token="<|done|>"))
    data: Any = DataLoader([token_batch([1], [2])], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    with pytest.raises(ValueError, match=r"`eos_token` must be a token of the tokenizer, but got '<\|done\|>'"):
        fit(module, ExportModel("out"), data)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_module_without_a_policy() -> None:
    class Foreign(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(ValueError, match="Foreign has no model as `policy`"):
        fit(Foreign(), ExportModel("out"))


# -- models of transformers


@pytest.fixture
def base(folder: Path) -> str:
    pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 259}
    PretrainedLM(config={"model_type": "llama", **sizes}).model.save_pretrained("base")
    return "./base"


def test_settings_that_the_format_cannot_hold(base: str) -> None:
    with pytest.raises(ValueError, match="`max_shard_size` must be a size such as 5GB or 200MB, but got '5 apples'"):
        fit(SFTModule(PretrainedLM(base)), ExportModel("out", max_shard_size="5 apples"))
    with pytest.raises(ValueError, match="must not be the model that the run begins with, but got base"):
        fit(SFTModule(PretrainedLM(base)), ExportModel("base"))
    quantized = PretrainedLM(base)
    quantized.model.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"the base model is quantized.*adapter_only: true"):
        fit(SFTModule(quantized), ExportModel("out"))
    with pytest.raises(ValueError, match="`adapter_only` is true, but no adapters train"):
        fit(SFTModule(PretrainedLM(base)), ExportModel("out", adapter_only=True))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.parametrize(
    ("adapter", "alone", "message"),
    [
        ({"init_lora_weights": "pissa"}, True, "cannot be written alone"),
        ({"bias": "all"}, True, "cannot be written alone"),
        ({"lora_bias": True}, False, "cannot be merged into this model"),
    ],
    ids=["PiSSA alone", "biases alone", "own biases merged"],
)
def test_adapters_that_cannot_be_written(adapter: dict[str, Any], alone: bool, message: str, folder: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra hf")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 259}
    model = PretrainedLM(config={"model_type": "llama", "attention_bias": "bias" in adapter, **sizes})
    model.model.save_pretrained("base")
    build = functools.partial(PretrainedLM, "./base", adapter={"r": 2, "target_modules": ["q_proj"], **adapter})
    with pytest.raises(ValueError, match=message):
        fit(DPOModule(build()), ExportModel("out", adapter_only=alone))
    assert fit(DPOModule(build()), ExportModel("out", adapter_only=not alone)) == 1
