"""Training without dropout: policy and reference compute alike, and what else depends on the mode keeps working."""

import functools
import gc
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule
from lightning_align.dpo.monitor import PreferenceMonitor
from lightning_align.models.dropout import without_dropout
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.sft.module import SFTModule
from tests.models.families import FAMILIES
from tests.toys import largest_difference, preference_batch, tiny_palm, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
SGD = functools.partial(torch.optim.SGD, lr=0.05)


class Functional(nn.Module):
    """Dropout without a layer: its probability is a constant in the code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_tokens = 23
        self.embedding, self.output = nn.Embedding(23, 8), nn.Linear(8, 23)
        self.recurrent = nn.LSTM(8, 8, num_layers=2, batch_first=True, dropout=0.4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.embedding(tokens), 0.3, training=self.training)
        out: Tensor = self.output(self.recurrent(x)[0])
        return out


def pretrained(family: str, **options: Any) -> PretrainedLM:
    torch.manual_seed(0)
    return PretrainedLM(config={"model_type": family, **FAMILIES[family], **options.pop("config", {})}, **options)


MODELS: dict[str, Callable[[], DPOModule]] = {
    "layers of gpt2": lambda: DPOModule(pretrained("gpt2"), optimizer=SGD),
    "attention of llama": lambda: DPOModule(pretrained("llama", config={"attention_dropout": 0.4}), optimizer=SGD),
    "skipped layers of opt": lambda: DPOModule(pretrained("opt", config={"layerdrop": 0.6}), optimizer=SGD),
    "jitter of mixtral": lambda: DPOModule(pretrained("mixtral", config={"router_jitter_noise": 0.5}), optimizer=SGD),
    "gradient checkpointing": lambda: DPOModule(pretrained("gpt2", gradient_checkpointing=True), optimizer=SGD),
    "palm": lambda: DPOModule(tiny_palm(ff_dropout=0.3, attn_dropout=0.3), optimizer=SGD),
    "functional": lambda: DPOModule(Functional(), optimizer=SGD),
    "functional, ipo": lambda: DPOModule(Functional(), loss="ipo", beta=1.0, optimizer=SGD),
}


def fit(module: Any, folder: Path, batch: Any, **arguments: Any) -> tuple[dict[str, float], list[str]]:
    """Train one step. Return its metrics, and the warnings of the identity check."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "max_steps": 1, "enable_checkpointing": False, "log_every_n_steps": 1}
    trainer = L.Trainer(**{**quiet, "default_root_dir": folder, **arguments})
    data: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data)
    texts = [str(warning.message) for warning in caught if "equal its reference" in str(warning.message)]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, texts


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_step_of_dpo_has_ratios_of_zero(kind: str, tmp_path: Path) -> None:
    module = MODELS[kind]()
    values, faults = fit(module, tmp_path, preference_batch(4), callbacks=[PreferenceMonitor()])
    assert faults == []
    assert abs(values["train/rewards/chosen"]) < 1e-4 and abs(values["train/rewards/rejected"]) < 1e-4
    assert values["train/logps/chosen_displacement"] == pytest.approx(0, abs=1e-5)
    if "sigmoid" in module.objective.weights:
        assert values["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(part.training for part in module.policy.modules()), "the modes are restored after the step"


@pytest.mark.parametrize("adapter", ["ours", "peft"])
def test_adapters_train_without_their_dropout(adapter: str, tmp_path: Path) -> None:
    def module(probability: float) -> DPOModule:
        if adapter == "peft":
            return DPOModule(pretrained("llama", adapter={"r": 2, "lora_dropout": probability}), optimizer=SGD)
        return DPOModule(pretrained("llama"), lora=LoRAConfig(rank=2, dropout=probability), optimizer=SGD)

    losses = []
    for probability in (0.0, 0.5):
        L.seed_everything(1, verbose=False)
        # At the first step the adapters are 0, so that their dropout shows only in the second.
        values, _ = fit(module(probability), tmp_path, preference_batch(4), max_steps=2, max_epochs=2)
        losses.append(values["train/loss"])
    assert losses[0] == losses[1] != pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("kind", ["layers of gpt2", "functional"])
def test_dropout_can_be_asked_for(kind: str, tmp_path: Path) -> None:
    module = MODELS[kind]()
    given = DPOModule(module.source.backbone, dropout=True, optimizer=SGD)
    values, (fault,) = fit(given, tmp_path, preference_batch(4))
    assert abs(values["train/loss"] - math.log(2)) > 1e-4
    assert "dropout: In evaluation mode the policy equals the reference. Set `dropout` to false" in fault


def test_sft_keeps_the_dropout_of_the_model_unless_told(tmp_path: Path) -> None:
    batch = token_batch([2, 1], [5, 4])
    values = {}
    for given in (None, True, False):
        values[given], _ = fit(SFTModule(Functional(), dropout=given, optimizer=SGD), tmp_path, batch)
    assert values[None]["train/loss"] == values[True]["train/loss"]
    model = Functional().eval()
    logps = model(batch["tokens"])[:, :-1].log_softmax(-1).gather(-1, batch["tokens"][:, 1:, None])[..., 0]
    plain = float(-logps[batch["targets"][:, 1:]].mean().detach())
    assert values[False]["train/loss"] == pytest.approx(plain, rel=1e-5)
    assert abs(values[True]["train/loss"] - plain) > 1e-3


def test_it_is_said_once_that_dropout_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    told = "Dropout of up to 0.1 is off in policy and reference"
    module = MODELS["layers of gpt2"]()
    for _ in range(2):
        fit(module, tmp_path, preference_batch(2))
    assert caplog.text.count(told) == 1
    caplog.clear()
    fit(DPOModule(pretrained("gpt2"), dropout=False, optimizer=SGD), tmp_path, preference_batch(2))
    assert told not in caplog.text


def test_checkpointed_layers_are_computed_again_without_dropout() -> None:
    """Each layer runs twice, and the gradients are those of evaluation mode."""
    saving, plain = pretrained("gpt2", gradient_checkpointing=True), pretrained("gpt2")
    plain.load_state_dict(saving.state_dict())
    calls: list[bool] = []
    saving.blocks[0].mlp.register_forward_pre_hook(lambda module, *_: calls.append(module.training))  # type: ignore[union-attr,operator]
    tokens = token_batch([3], [9])["tokens"]
    saving.train()
    modes = {name: part.training for name, part in saving.named_modules()}
    functions = [block._gradient_checkpointing_func for block in saving.blocks]
    with without_dropout(saving):
        saving(tokens).square().mean().backward()
    assert calls == [False, False]
    assert modes == {name: part.training for name, part in saving.named_modules()}
    assert functions == [block._gradient_checkpointing_func for block in saving.blocks]
    plain.eval()(tokens).square().mean().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (saving, plain)]
    assert largest_difference(*gradients) < 1e-7


def test_modes_are_restored_one_by_one_and_recurrent_layers_stay_in_training_mode() -> None:
    model = Functional().train()
    model.output.eval()
    with pytest.raises(RuntimeError, match="stop"), without_dropout(model):
        # cuDNN has no backward pass of recurrent layers in evaluation mode.
        assert not model.training and model.recurrent.training and model.recurrent.dropout == 0
        raise RuntimeError("stop")
    assert model.training and not model.output.training and model.recurrent.dropout == 0.4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_that_failed_in_a_step_changes_nothing_when_it_is_collected(checkpointing: bool, tmp_path: Path) -> None:
    """As an open context would, which is closed when it is collected: in the middle of another run without gradients."""

    class Fails(DPOModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("stop")

    policy = tiny_palm()

    def run() -> None:
        module = Fails(policy, optimizer=SGD, activation_checkpointing=checkpointing)
        with pytest.raises(RuntimeError, match="stop"):
            fit(module, tmp_path, preference_batch(4))

    run()
    policy.train()
    with torch.no_grad():
        gc.collect()
        assert not torch.is_grad_enabled()
    assert policy.training
