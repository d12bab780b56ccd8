"""Lightning's Tuner with the modules: the found rate is used, and the search leaves the weights as they were."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.tuner import Tuner

from lightning_align.training.schedules import WarmupDecay
from tests.toys import largest_difference, state_of
from tests.training.runs import BATCHES, METHODS, MODULES, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@METHODS
@pytest.mark.parametrize("optimizer", [None, functools.partial(torch.optim.SGD, lr=0.5)])
def test_the_found_rate_is_used(method: str, optimizer: Any, tmp_path: Path) -> None:
    module, batches = MODULES[method](optimizer=optimizer), [BATCHES[method]]
    module.configure_model()
    before = state_of(module.policy)
    run = trainer(tmp_path, max_epochs=2)
    found = Tuner(run).lr_find(module, loader(batches * 20), min_lr=1e-6, max_lr=1e-2, num_training=20)
    assert found is not None
    assert largest_difference(state_of(module.policy), before) == 0
    run.fit(module, loader(batches * 20))
    assert largest_difference(state_of(module.policy), before) > 0
    assert {group["lr"] for group in run.optimizers[0].param_groups} == {found.suggestion()}
    assert type(run.optimizers[0]) is (torch.optim.AdamW if optimizer is None else torch.optim.SGD)


def test_a_schedule_is_relative_to_the_found_rate(tmp_path: Path) -> None:
    schedule = functools.partial(WarmupDecay, total_steps=10, warmup_steps=2)
    module = MODULES["sft"](optimizer=functools.partial(torch.optim.SGD, lr=0.5), lr_scheduler=schedule)
    module.learning_rate = 0.25
    run = trainer(tmp_path)
    run.fit(module, loader([BATCHES["sft"]]))
    assert {group["initial_lr"] for group in run.optimizers[0].param_groups} == {0.25}
