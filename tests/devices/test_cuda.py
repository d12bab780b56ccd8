"""Every method on a real GPU: training, validation, prediction, waits, resumed runs, and precisions.

The harness itself is checked on the CPU, so that it runs on the day that there is a GPU.
"""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import lightning_align as la
from lightning_align.scoring.head import head_logprobs
from tests.devices.cases import STEPS, dpo, palm, sft
from tests.devices.test_steps import BASIC, OPTIONS

pytestmark = [
    pytest.mark.filterwarnings("ignore:The loss has been called"),
    pytest.mark.filterwarnings("ignore:.*documents of validation have near-duplicates"),
    pytest.mark.filterwarnings("ignore:the first batch, where the policy should still equal its reference"),
]
GPU_ONLY = pytest.mark.gpu


class Strict(Callback):
    """Makes CUDA raise where the host waits, from the end of the first step of each epoch to the end of the last one.

    Args:
        on: Whether to. Without it, only steps are counted.
    """

    def __init__(self, on: bool) -> None:
        self.on, self.steps, self.losses = on, 0, list[float]()

    def _mode(self, mode: str) -> None:
        if self.on:
            torch.cuda.set_sync_debug_mode(mode)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        self.steps += 1
        self._mode("default")
        if not self.on:
            self.losses.append(float(trainer.callback_metrics.get("train/loss", torch.nan)))
        if not trainer.is_last_batch:
            self._mode("error")

    def on_exception(self, *_: Any) -> None:
        self._mode("default")


def trainer(folder: Path, callbacks: list[Callback], *, accelerator: str = "cuda", **more: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    limits = {"limit_train_batches": STEPS, "limit_val_batches": 2, "limit_predict_batches": 1, "num_sanity_val_steps": 0}
    given = {"max_epochs": 1, "log_every_n_steps": 1000, "default_root_dir": folder, "callbacks": callbacks, **quiet, **limits}
    return L.Trainer(accelerator=accelerator, devices=1, **{**given, **more})


def check_run(name: str, folder: Path, precision: str, *, accelerator: str = "cuda") -> L.LightningModule:
    case, budget = (BASIC | OPTIONS)[name]
    module, data, callbacks = case(folder)
    strict = Strict(on=accelerator == "cuda" and budget.step == 0)
    epochs = budget.epochs
    run = trainer(
        folder,
        [*callbacks, strict],
        accelerator=accelerator,
        precision=precision,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
    )
    try:
        run.fit(module, datamodule=data)
    finally:
        strict._mode("default")
    assert strict.steps == STEPS * epochs
    run.validate(module, datamodule=data, verbose=False)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in run.callback_metrics.values())
    rows: Any = run.predict(module, datamodule=data)
    assert rows and len(rows[0]) == 4
    return module


@GPU_ONLY
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", BASIC)
def test_methods_train_without_waits_validate_and_predict(name: str, precision: str, tmp_path: Path) -> None:
    module = check_run(name, tmp_path, precision)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@GPU_ONLY
@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_without_waits_validate_and_predict(name: str, tmp_path: Path) -> None:
    check_run(name, tmp_path, "bf16-mixed")


def test_the_harness_runs_on_the_cpu(tmp_path: Path) -> None:
    check_run("sft", tmp_path, "32-true", accelerator="cpu")


def resumed(folder: Path, accelerator: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of a run of two epochs, and those of a run that is resumed after the first."""
    weights = []
    start = palm().state_dict()

    def run(name: str, epochs: int, path: str | None = None) -> tuple[L.Trainer, nn.Module]:
        place = folder / name
        place.mkdir(exist_ok=True)
        model = palm()
        model.load_state_dict(start)
        module, data, _ = sft(place, backbone=model)
        made = trainer(place, [], accelerator=accelerator, max_epochs=epochs, enable_checkpointing=False)
        made.fit(module, datamodule=data, ckpt_path=path)
        return made, module

    _, whole = run("whole", 2)
    first, _ = run("parts", 1)
    path = str(folder / "first.ckpt")
    first.save_checkpoint(path)
    _, rest = run("parts", 2, path)
    for module in (whole, rest):
        weights.append({name: value.detach().cpu() for name, value in module.state_dict().items()})
    return weights[0], weights[1]


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=GPU_ONLY)])
def test_a_resumed_run_equals_the_whole_run(accelerator: str, tmp_path: Path) -> None:
    whole, rest = resumed(tmp_path, accelerator)
    assert whole.keys() == rest.keys()
    for name, value in whole.items():
        # Sums on a GPU are in any order. AdamW moves a weight by its rate, 3e-4, whatever the size of a gradient near 0.
        limit = 0.0 if accelerator == "cpu" else 1e-4
        assert float((value.double() - rest[name].double()).abs().max()) <= limit, name


@GPU_ONLY
def test_a_checkpoint_of_a_gpu_loads_on_the_cpu(tmp_path: Path) -> None:
    module, data, _ = sft(tmp_path)
    run = trainer(tmp_path, [])
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "gpu.ckpt")
    kept = la.SFTModule.load_from_checkpoint(tmp_path / "gpu.ckpt", backbone=palm(), map_location="cpu", weights_only=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value.cpu(), kept.state_dict()[name].cpu()), name


@GPU_ONLY
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("method", [sft, dpo], ids=["sft", "dpo"])
def test_curves_in_16_bits_follow_those_of_float32(method: Any, precision: str, tmp_path: Path) -> None:
    start = palm(dim=32).state_dict()
    losses = {}
    for kind in ("32-true", precision):
        folder = tmp_path / kind
        folder.mkdir()
        model = palm(dim=32)
        model.load_state_dict(start)
        module, data, _ = method(folder, backbone=model, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
        strict = Strict(on=False)
        run = trainer(folder, [strict], precision=kind, max_epochs=10, log_every_n_steps=1)
        run.fit(module, datamodule=data)
        losses[kind] = torch.tensor(strict.losses)
    truth, found = losses["32-true"], losses[precision]
    fallen = truth[:STEPS].mean() - truth[-STEPS:].mean()
    assert fallen > 0
    assert float((found[-STEPS:].mean() - truth[-STEPS:].mean()).abs()) < 0.1 * fallen + 1e-2


@GPU_ONLY
@pytest.mark.parametrize("method", ["palm", "calm", "retro"])
def test_greedy_responses_of_a_gpu_are_those_of_the_cpu(method: str) -> None:
    model: Any = palm(dim=16).double().eval()
    if method == "calm":
        model = la.CALM(model, [la.Augment(palm().double(), num_connections=1)], connection=la.ConnectionConfig(heads=2))
    elif method == "retro":
        model = la.RETRO(model, chunk_size=8, heads=2, dim_head=4)
    model = model.double().eval()
    prompts = [[5, 6, 7], [9], list(range(20, 31))]
    config = la.GenerationConfig(max_new_tokens=12, temperature=0.0, batch_size=2)
    expected = la.generate(model, prompts, config)
    found = la.generate(copy.deepcopy(model).cuda(), prompts, config)
    assert [[one.tokens for one in row] for row in found] == [[one.tokens for one in row] for row in expected]


@GPU_ONLY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_of_a_gpu_are_those_of_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).to(dtype), torch.randn(1000, 64).to(dtype)
    targets = torch.randint(0, 1000, (300,))
    expected = torch.log_softmax(hidden.double() @ weight.double().T, 1).gather(1, targets[:, None])[:, 0]
    found = head_logprobs(hidden.cuda(), weight.cuda(), None, targets.cuda()).cpu()
    # Logits reach 40; float32 holds them to 4e-6.
    assert found.dtype is torch.float32 and float((found.double() - expected).abs().max()) < 1e-4
