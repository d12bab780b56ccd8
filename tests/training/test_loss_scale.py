"""16-mixed: the first step is taken, although losses are sums, and its gradient is that of float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_align.training.gradient import lower_scale
from tests.toys import largest_difference, split, state_of, tiny_palm
from tests.training.runs import BATCHES, MODULES, SGD, Gradients, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def fit(method: str, folder: Path, *, parts: int = 1, plugin: Any = None, **arguments: Any) -> tuple[Any, Gradients]:
    seen = Gradients()
    module = MODULES[method](backbone=tiny_palm(), optimizer=SGD)
    how = {} if plugin is None else {"plugins": [plugin]}
    run = trainer(folder, max_steps=1, accumulate_grad_batches=parts, callbacks=[seen], **how, **arguments)
    run.fit(module, loader(split(BATCHES[method], 8 // parts)))
    return module, seen


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_first_step_has_the_gradient_of_float32(method: str, parts: int, tmp_path: Path) -> None:
    single, expected = fit(method, tmp_path, parts=parts)
    plugin = MixedPrecision("16-mixed", "cpu")
    half, seen = fit(method, tmp_path, parts=parts, plugin=plugin)
    assert seen.norms, "the step was skipped"
    assert seen.norms == [pytest.approx(expected.norms[0], rel=0.02)]
    start = state_of(tiny_palm())
    far = largest_difference(state_of(single.policy), start)
    assert largest_difference(state_of(half.policy), state_of(single.policy)) < 0.05 * far
    count = float(BATCHES["sft"]["targets"].sum()) if method == "sft" else 8
    assert plugin.scaler is not None
    assert count / parts <= 2.0**10 / plugin.scaler.get_scale() or parts > 1


def test_a_sum_with_the_default_scale_would_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_align.training.precision.lower_scale", lambda *_: None)
    _, seen = fit("sft", tmp_path, plugin=MixedPrecision("16-mixed", "cpu"))
    assert not seen.norms


def test_a_scale_that_is_lower_is_kept() -> None:
    for given, count, wanted in ((2.0**16, 1, 2.0**10), (2.0**16, 1000, 1.0), (0.5, 1000, 0.5), (2.0**16, 0, 2.0**10)):
        scaler = torch.amp.GradScaler("cpu", init_scale=given)
        lower_scale(scaler, count)
        assert scaler.get_scale() == wanted
        assert float(scaler.scale(torch.ones(()))) == wanted


def test_a_resumed_run_keeps_its_scale(tmp_path: Path) -> None:
    module = MODULES["sft"](optimizer=SGD)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=1))
    run = trainer(tmp_path, max_steps=2, plugins=[plugin])
    run.fit(module, loader(split(BATCHES["sft"], 4)))
    run.save_checkpoint(tmp_path / "two.ckpt")
    assert plugin.scaler is not None
    scale = plugin.scaler.get_scale()
    again = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=100))
    resumed = trainer(tmp_path, max_steps=3, max_epochs=2, plugins=[again])
    resumed.fit(MODULES["sft"](optimizer=SGD), loader(split(BATCHES["sft"], 4)), ckpt_path=tmp_path / "two.ckpt")
    assert again.scaler is not None and again.scaler.get_scale() == 2 * scale  # the growth of each step is restored, too
