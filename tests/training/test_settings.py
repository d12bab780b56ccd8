"""The settings in TensorBoard's tab HPARAMS: flat, few, and those that a run really has."""

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_align import DPODataModule, DPOModule, LoRAConfig, SFTModule, WarmupDecay
from lightning_align.training.settings import run_settings
from tests.cli.runs import write_rows
from tests.toys import tiny_palm
from tests.training.runs import BATCHES, METHODS, MODULES, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


def logged(folder: str) -> dict[str, Any]:
    """What TensorBoard shows of a run."""
    data = EventAccumulator(folder).Reload().PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def test_ten_flat_settings_of_a_run(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(8)]
    data = DPODataModule(
        write_rows(tmp_path / "pairs.jsonl", rows), batch_size=2, max_length=24, cache_dir=str(tmp_path / "cache")
    )
    module = DPOModule(
        tiny_palm(num_tokens=259),
        loss={"sigmoid": 0.8, "ipo": 0.2},
        beta=0.25,
        optimizer=functools.partial(torch.optim.SGD, lr=0.125),
        lr_scheduler=functools.partial(WarmupDecay, total_steps=9, warmup_steps=3),
    )
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    L.Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2, logger=logger, log_every_n_steps=1).fit(module, data)
    logger.experiment.flush()
    assert logged(logger.log_dir) == {
        "model": "PaLM",
        "optimizer": "SGD",
        "lr": 0.125,  # of the optimizer, and not the 0 that a warmup begins with
        "batch_size": 4,
        "max_length": 24,
        "steps": 2,
        "loss": "0.8 sigmoid + 0.2 ipo",
        "beta": 0.25,
        "reference": "frozen",
    }


@METHODS
def test_the_settings_of_each_method_are_few_and_flat(method: str, tmp_path: Path) -> None:
    run, module = trainer(tmp_path, max_steps=1), MODULES[method]()
    run.fit(module, loader([BATCHES[method]] * 2))
    found = run_settings(module)
    assert {"model", "optimizer", "lr", "steps"} <= set(found) and len(found) <= 10
    assert all(isinstance(value, (bool, int, float, str)) for value in found.values())
    assert found["steps"] == 1


def test_the_rank_of_adapters_is_shown(tmp_path: Path) -> None:
    base = tmp_path / "base.pt"
    torch.save(tiny_palm().state_dict(), base)
    module = SFTModule(tiny_palm, init_from=str(base), lora=LoRAConfig(rank=3))
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader([BATCHES["sft"]]))
    assert run_settings(module)["lora_rank"] == 3
