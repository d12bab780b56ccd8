"""Modules that hydra builds from a configuration get containers of OmegaConf, which no checkpoint may hold."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from lightning_align import Augment, CALMModule, DPOModule, PaLM, SFTModule
from lightning_align.models.checkpoint import read_checkpoint
from lightning_align.training.checkpoints import make_storable
from tests.toys import VOCABULARY, preference_batch, token_batch
from tests.training.places import build

PALM = {"_target_": "lightning_align.PaLM", "num_tokens": VOCABULARY, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
SHARED = {
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-2, "betas": [0.9, 0.98]},
    "lr_scheduler": {"_target_": "lightning_align.WarmupDecay", "_partial_": True, "total_steps": 9, "warmup_steps": 1},
    "generation": {"max_new_tokens": 4},
}
AUGMENT = {"_target_": "lightning_align.Augment", "model": PALM, "num_connections": 1}
MODULES: dict[str, dict[str, Any]] = {
    "sft": {"_target_": "lightning_align.SFTModule", "backbone": {**PALM, "_partial_": True}},
    "dpo": {"_target_": "lightning_align.DPOModule", "backbone": PALM, "loss": {"sigmoid": 0.8, "bco_pair": 0.2}},
    "calm": {"_target_": "lightning_align.CALMModule", "anchor": PALM, "augments": [AUGMENT]},
}


def loader(name: str) -> Any:
    batches = [preference_batch(2) if name == "dpo" else token_batch([2, 3], [3, 2])] * 2
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def instantiated(config: Any) -> Any:
    torch.manual_seed(1)  # a reference is made of the first weights, and these are random
    return instantiate(config)


@pytest.mark.parametrize("convert", ["none", "all"])
@pytest.mark.parametrize("name", MODULES)
def test_a_run_of_hydra_is_saved_read_and_resumed(name: str, convert: str, tmp_path: Path) -> None:
    config = OmegaConf.create({**MODULES[name], **SHARED, "_convert_": convert})
    quiet: Any = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "limit_val_batches": 0,
    }
    trainer = L.Trainer(**quiet, max_steps=2, enable_checkpointing=False, default_root_dir=tmp_path)
    module = instantiated(config)
    trainer.fit(module, loader(name), loader(name))
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    content = read_checkpoint(tmp_path / "run.ckpt")  # opens tensors and primitive types only
    assert list(content["optimizer_states"][0]["param_groups"][0]["betas"]) == [0.9, 0.98]
    if name == "dpo":
        assert content["hyper_parameters"]["loss"] == {"sigmoid": 0.8, "bco_pair": 0.2}
    kinds = {"sft": SFTModule, "dpo": DPOModule, "calm": CALMModule}
    sizes = {key: value for key, value in PALM.items() if key != "_target_"}
    arguments: dict[str, Any] = {"backbone": PaLM(**sizes)} if name == "sft" else {}
    if name == "calm":
        augment = Augment(module.policy.augments[0], num_connections=1)
        arguments = {"anchor": module.policy.anchor, "augments": [augment]}
    again = kinds[name].load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, **arguments)
    for key, value in module.policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[key], value), key

    resumed = L.Trainer(**quiet, max_steps=4, enable_checkpointing=False, default_root_dir=tmp_path, max_epochs=-1)
    rebuilt = instantiated(config)
    if name == "calm":  # the frozen models of the first run, which the configuration would draw again
        rebuilt = CALMModule(**arguments, optimizer=module.make_optimizer, lr_scheduler=module.make_schedule)
    resumed.fit(rebuilt, loader(name), loader(name), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert resumed.global_step == 4


class Odd(SFTModule):
    def __init__(self, backbone: nn.Module, teacher: Any = None, name: str = "x") -> None:
        super().__init__(backbone)
        self.teacher = teacher


def test_an_argument_that_no_checkpoint_can_hold_is_left_out_and_named(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {key: value for key, value in PALM.items() if key != "_target_"}
    with pytest.warns(
        UserWarning, match=r"Odd: the argument `teacher` is not saved in checkpoints, because teacher is a slice"
    ):
        module = Odd(PaLM(**sizes), teacher=slice(1), name="y")
    assert module.teacher == slice(1) and module.hparams["name"] == "y" and "teacher" not in module.hparams


def test_a_foreign_state_is_named() -> None:
    checkpoint = {"state_dict": {}, "callbacks": {"Own": {"best": object(), "seen": (1, 2)}}}
    with pytest.warns(UserWarning, match="holds a object in callbacks/Own/best"):
        make_storable(checkpoint, "Module")


def test_arguments_that_a_subclass_saves_are_left_out_too(tmp_path: Path) -> None:
    """It calls `save_hyperparameters` after the constructor of this package has looked at them."""
    module, data, _ = build("sft", tmp_path)

    class Odd(SFTModule):
        def __init__(self, odd: object, number: object, **options: Any) -> None:
            super().__init__(module.source.backbone, **options)
            self.save_hyperparameters("odd", "number")

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    data.batch_size = np.int64(2)
    assert type(data.batch_size) is int
    run = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, default_root_dir=tmp_path, **quiet)
    said = "Odd: the argument `odd` is not saved in checkpoints, because odd is a ndarray"
    with pytest.warns(UserWarning, match=said):
        own = Odd(odd=np.arange(3), number=np.float32(0.5))
    assert "odd" in own.hparams
    run.fit(own, data)
    with pytest.warns(UserWarning, match=said):
        run.save_checkpoint(tmp_path / "odd.ckpt")
    arguments = torch.load(tmp_path / "odd.ckpt", weights_only=True)["hyper_parameters"]
    assert arguments["number"] == 0.5 and type(arguments["number"]) is float and "odd" not in arguments
