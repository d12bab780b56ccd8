"""What earlier releases wrote opens, goes on and is found again; see `make.py`."""

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_align
from lightning_align import ReferenceUpdate, RETROModule, SelfPlayGeneration, SFTModule
from lightning_align.cli import AlignCLI, run
from lightning_align.models.formats import read_adapter, read_model
from tests.compatibility.kept import FURTHER, MODULES, STEPS, TOKENS, losses, numbers

HERE = Path(__file__).resolve().parent
RELEASES = sorted(path.name for path in HERE.iterdir() if (path / "expected.json").is_file())
# Processors add float32 numbers in different orders. Logits of about 1 are sums of at most 64 terms a layer, in three layers:
# each order is off by about 1e-6. The numbers differ from run to run and from method to method by 1e-2 and more.
NEAR = {"rel": 1e-4, "abs": 1e-4}
AFTER_A_STEP = {"rel": 1e-3}
"""Of a loss after an optimizer step, which divides such differences by the gradient's size."""

NAMES = {
    "callbacks": ["PredictionWriter", "SampleLogger", "SolveRate"],
    "datamodule": ["AlignDataModule", "Stage"],
    "distributed": ["T", "check_writable", "everyone", "is_sharded", "largest", "publish", "publish_text", "share", "world"],
    "export": ["ExportModel", "SHOWN", "export_checkpoint", "model_card"],
    "hub": ["SECONDS", "out_of_reach"],
    "logprobs": [
        *("CHUNK_BYTES", "KEEP_BYTES", "LENGTH_GROUPS", "TILE_ROWS", "head_logprobs", "logits_logprobs"),
        *("response_collisions", "response_logprobs", "select_targets", "sum_logprobs", "target_logprobs", "token_logprobs"),
    ],
    "memory": ["CHOSEN", "M_MMAP_MAX", "M_TRIM_THRESHOLD", "keep_freed_memory"],
    "metrics": ["Correlation", "PairMeans", "TokenNLL"],
    "module": ["AlignModule"],
    "pairwise": [
        *("Divergence", "IN_DELTA", "LOSSES", "LossName", "Objective", "PairwiseLoss", "REFERENCE_FREE", "Ratios"),
        *("SATURATED", "SMOOTHED", "SORTED", "aot_loss", "aot_unpaired_loss", "apo_down_loss", "apo_zero_loss"),
        *("bco_pair_loss", "check_loss", "confidence_weights", "cpo_loss", "discopop_loss", "diverge", "dpop_loss"),
        *("exo_pair_loss", "hinge_loss", "ipo_loss", "log_ratios", "nca_pair_loss", "orpo_loss", "pair_metrics"),
        *("robust_loss", "sigmoid_loss", "sigmoid_norm_loss", "simpo_loss", "split_pairs", "sppo_hard_loss", "tail_weights"),
    ],
    "reference": [
        *("AdaptersOff", "Average", "FrozenCopy", "MovingAdapters", "MovingCopy", "MovingReference", "REFERENCE_SCOPE"),
        *("Reference", "ReferenceUpdate", "frozen_copy", "moving_reference"),
    ],
    "schedules": ["WarmupDecay"],
    "stored": ["KEY_BYTES", "Source", "StoredLogProbs", "row_keys"],
}
"""The public names of the modules that stood beside the folders in release 0.1.0."""


@pytest.fixture(params=RELEASES)
def expected(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of a release's artifacts as the current folder, for paths in them are relative; and the numbers of then."""
    shutil.copytree(HERE / request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    content: dict[str, Any] = json.loads(Path("expected.json").read_text())
    return content


def opened(name: str) -> Any:
    module = getattr(lightning_align, MODULES[name])
    return module.load_from_checkpoint(f"checkpoints/{name}.ckpt", map_location="cpu", weights_only=True)


@torch.no_grad()
def check_logits(model: torch.nn.Module, then: list[list[float]]) -> None:
    now = numbers(model.eval()(torch.tensor([TOKENS])))
    assert [pytest.approx(row, **NEAR) for row in then] == now


def files(*folders: str) -> dict[str, tuple[int, str]]:
    """When each file was written, and what is in it; not when for those that each run writes, what they hold already or not."""
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                listed = path.name == "database.json" or (path.name.startswith("states-") and path.suffix == ".json")
                when = 0 if listed else path.stat().st_mtime_ns
                found[str(path)] = when, hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_there_are_releases() -> None:
    assert "0.1.0" in RELEASES


@pytest.mark.parametrize("name", MODULES)
def test_a_checkpoint_is_opened(name: str, expected: dict[str, Any]) -> None:
    content = torch.load(f"checkpoints/{name}.ckpt", map_location="cpu", weights_only=True)
    assert content["global_step"] == STEPS[name]
    module = opened(name)
    assert type(module).__name__ == MODULES[name]
    check_logits(module, expected["logits"][name])


def test_a_checkpoint_names_classes_by_their_old_modules(expected: dict[str, Any]) -> None:
    path = "checkpoints/sft.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["lr_scheduler"]["class_path"] = "lightning_align.schedules.WarmupDecay"
    torch.save(content, path)
    assert opened("sft").make_schedule is not None
    going_on("sft")


@pytest.mark.parametrize("name", [name for name in MODULES if name != "calm"])  # of which only the connections are saved
def test_a_run_begins_from_a_checkpoint(name: str, expected: dict[str, Any]) -> None:
    path = f"checkpoints/{name}.ckpt"
    module = RETROModule(init_from=path) if name == "retro" else SFTModule(init_from=path)
    module.configure_model()
    check_logits(module, expected["logits"][name])


def going_on(name: str) -> AlignCLI:
    steps = ["--trainer.max_steps", str(STEPS[name] + FURTHER)]
    cli = run(["fit", "--config", f"configs/{name}.yaml", "--ckpt_path", f"checkpoints/{name}.ckpt", *steps])
    assert cli is not None
    return cli


@pytest.mark.parametrize("name", MODULES)
def test_a_run_goes_on(name: str, expected: dict[str, Any]) -> None:
    before = files("cache", "database", "sets", "documents")
    cli = going_on(name)
    trainer, end = cli.trainer, STEPS[name] + FURTHER
    assert trainer.global_step == end
    # The second iteration of self-play begins its optimizer anew, after three steps.
    updates = end - 3 if name == "spin" else end
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {updates}
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == updates
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the Trainer's connector
        if isinstance(callback, ReferenceUpdate):
            assert callback.steps == end
        if isinstance(callback, SelfPlayGeneration):
            assert callback.iteration == 1
    first, second = losses(Path(str(trainer.log_dir)))
    assert first == pytest.approx(expected["losses"][name][0], **NEAR)
    assert second == pytest.approx(expected["losses"][name][1], **AFTER_A_STEP)
    # What was tokenised, scored and generated is found: nothing is written again, and nothing besides.
    same_files(name, before, files("cache", "database", "sets", "documents"))


def same_files(name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    if name == "retro":
        # A database of this release is keyed by what its sources said of themselves, and looks for copies among raw ids. A fit
        # builds it again beside the old stages, which stay as they are.
        head = "database/database.json"
        assert before.pop(head) != after[head]
        after = {path: after[path] for path in after if path in before or not path.startswith("database/")}
    assert after == before


@pytest.mark.parametrize("name", ["sft", "dpo_moving", "retro"])
def test_a_configuration_runs(name: str, expected: dict[str, Any]) -> None:
    before = files("cache", "database")
    # So that it validates as well.
    cli = run(["fit", "--config", f"configs/{name}.yaml", "--trainer.limit_train_batches", "2"])
    assert cli is not None
    assert cli.trainer.global_step == STEPS[name]
    same_files(name, before, files("cache", "database"))
    if name == "sft":
        folder = Path(str(cli.trainer.log_dir))
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 2
        assert "val/solved" in cli.trainer.callback_metrics
        assert read_model(folder / "export") is not None


def test_exported_models_are_opened(expected: dict[str, Any]) -> None:
    check_logits(read_model("export"), expected["logits"]["export"])
    module = SFTModule(init_from="export")
    module.configure_model()
    check_logits(module, expected["logits"]["export"])


def test_exported_adapters_are_put_on(expected: dict[str, Any]) -> None:
    policy = opened("sft").policy
    assert read_adapter(policy, "adapter")
    check_logits(policy, expected["logits"]["sft_lora"])


def test_a_retrieval_database_is_opened(expected: dict[str, Any]) -> None:
    before = files("database")
    query = [byte + 3 for byte in b"at noon,"]  # as the byte tokenizer has it
    found = lightning_align.open_retriever("database").search([query], 1)
    table = lightning_align.RetrievalDatabase.open("database").chunks
    assert [table.document_ids[int(table.document_of(i))] for i in found.ids[0]] == ["c.txt"]
    assert files("database") == before


@pytest.mark.parametrize("module", NAMES)
def test_old_modules_have_their_names(module: str) -> None:
    old = importlib.import_module(f"lightning_align.{module}")
    for name in NAMES[module]:
        value = getattr(old, name)
        if name in lightning_align.__all__:
            assert value is getattr(lightning_align, name)
