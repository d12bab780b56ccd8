"""Training of 16-bit weights: float32 copies for the optimizer, in checkpoints, and warnings where there are none."""

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_align.dpo.module import DPOModule
from lightning_align.models.checkpoint import load_policy
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.sft.module import SFTModule
from lightning_align.training.masters import MasterWeights, share_lost
from tests.toys import largest_difference, save_llama, split, state_of, tiny_palm
from tests.training.runs import BATCHES, MODULES, SFT_BATCH, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
METHODS = pytest.mark.parametrize("method", ["sft", "dpo"])
OPTIMIZERS = {
    "default": None,
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-5),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
}


class Curve(Callback):
    """Keeps the loss of each step, and the weights of the optimizer after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def masters(module: Any) -> dict[str, Tensor]:
    return {name: module.masters.of[p].detach().clone() for name, p in module.named_parameters() if p in module.masters.of}


def run(method: str, folder: Path, precision: str, **given: Any) -> tuple[Any, list[float]]:
    curve = Curve()
    arguments = given.pop("arguments", {})
    module = MODULES[method](backbone=tiny_palm(dtype=torch.bfloat16).float(), **given)
    trainer(folder, precision=precision, max_epochs=12, callbacks=[curve], **arguments).fit(module, loader([BATCHES[method]]))
    return module, curve.losses


@METHODS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bf16_true_trains_as_32_true(method: str, name: str, tmp_path: Path) -> None:
    """The updates are far below the resolution of the weights, and they follow those of float32."""
    given = {"optimizer": OPTIMIZERS[name]}
    wide, losses = run(method, tmp_path, "32-true", **given)
    narrow, others = run(method, tmp_path, "bf16-true", **given)
    start = state_of(tiny_palm(dtype=torch.bfloat16))
    far, apart = 0.0, 0.0
    for key, value in wide.policy.state_dict().items():
        own = masters(narrow)[f"policy.{key}"]
        far += float((value - start[key].float()).square().sum())
        apart += float((value - own).square().sum())
        assert torch.equal(own.bfloat16(), narrow.policy.state_dict()[key])
    # Adam normalizes each element, so those with a gradient near 0 may step the other way: measured 0.24 of the way.
    assert apart**0.5 < 0.5 * far**0.5
    # The fall of the loss, up to the rounding of the forward pass (0.05 nats).
    assert losses[0] > losses[-1]
    assert others[0] - others[-1] == pytest.approx(losses[0] - losses[-1], rel=0.5, abs=0.05)


@METHODS
def test_gradients_of_micro_batches_are_added_in_float32(method: str, tmp_path: Path) -> None:
    """Each micro-batch's bfloat16 gradient, added in float32, is what the optimizer gets."""
    sums: list[dict[str, Tensor]] = []

    class Sum(Callback):
        def __init__(self) -> None:
            self.total: dict[str, Tensor] = {}

        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for name, parameter in pl_module.named_parameters():
                if parameter.grad is not None:
                    assert parameter.grad.dtype is torch.bfloat16
                    self.total[name] = self.total.get(name, 0) + parameter.grad.float()

        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            found = {n: pl_module.masters.of[p].grad for n, p in pl_module.named_parameters() if p in pl_module.masters.of}
            if found and all(value is not None for value in found.values()):
                sums.append({name: value.clone() for name, value in found.items()})

    seen = Sum()
    module = MODULES[method](optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    batches = split(BATCHES[method], 1)
    trainer(tmp_path, precision="bf16-true", accumulate_grad_batches=8, max_epochs=2, callbacks=[seen]).fit(
        module, loader(batches)
    )
    first = sums[0]
    half = {name: value / 2 for name, value in seen.total.items()}  # of two equal epochs
    count = 8 / float(SFT_BATCH["targets"].sum()) if method == "sft" else 1.0
    for name, value in first.items():
        torch.testing.assert_close(value, half[name] * count, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_a_resumed_run_is_the_uninterrupted_one(lora: Any, tmp_path: Path) -> None:
    torch.save(tiny_palm().state_dict(), tmp_path / "base.pt")

    def fit(epochs: int, path: Path | None = None) -> Any:
        L.seed_everything(0, verbose=False)
        module = DPOModule(tiny_palm, init_from=str(tmp_path / "base.pt"), lora=lora)
        keep = ModelCheckpoint(tmp_path / str(epochs) / ("from" if path else "new"), save_last=True)
        run = trainer(tmp_path, precision="bf16-true", max_epochs=epochs, enable_checkpointing=True, callbacks=[keep])
        run.fit(module, loader(split(BATCHES["dpo"], 4)), ckpt_path=path)
        return module

    whole = fit(4)
    fit(2)
    resumed = fit(4, tmp_path / "2" / "new" / "last.ckpt")
    assert largest_difference(masters(whole), masters(resumed)) == 0
    assert largest_difference(state_of(whole.policy), state_of(resumed.policy)) == 0
    checkpoint = torch.load(tmp_path / "4" / "new" / "last.ckpt", weights_only=True)
    for name, value in masters(whole).items():
        assert torch.equal(checkpoint["state_dict"][name], value)
    moved = [float((value - value.bfloat16().float()).abs().max()) for value in masters(whole).values()]
    assert max(moved) > 0, "the copies are not just the rounded weights"
    # The checkpoint continues under another precision, from the float32 weights.
    module = DPOModule(tiny_palm, init_from=str(tmp_path / "base.pt"), lora=lora)
    with pytest.warns(UserWarning, match="is of a run with precision bf16-true, and this run has 32-true"):
        trainer(tmp_path, max_epochs=4).fit(
            module, loader(split(BATCHES["dpo"], 4)), ckpt_path=tmp_path / "4" / "new" / "last.ckpt"
        )
    if lora is None:
        for name, value in module.policy.state_dict().items():
            assert torch.equal(value, masters(whole)[f"policy.{name}"])
        assert load_policy(str(tmp_path / "4" / "new" / "last.ckpt")).state_dict().keys() == module.policy.state_dict().keys()


def test_a_checkpoint_has_the_copy_of_tied_weights_under_all_their_names(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    save_llama(tmp_path / "model", tied=True)
    module = SFTModule(PretrainedLM(str(tmp_path / "model")), optimizer=OPTIMIZERS["adamw"])
    fit = trainer(tmp_path, precision="bf16-true", max_epochs=3)
    fit.fit(module, loader([SFT_BATCH]))
    fit.save_checkpoint(tmp_path / "tied.ckpt")
    (copy,) = (value for name, value in masters(module).items() if "embed" in name)
    assert not torch.equal(copy, copy.bfloat16().float())
    state = torch.load(tmp_path / "tied.ckpt", weights_only=True)["state_dict"]
    tied = [value for name, value in state.items() if "embed" in name or "lm_head" in name]
    assert len(tied) == 2 and all(torch.equal(value, copy) for value in tied)
    policy = load_policy(tmp_path / "tied.ckpt")
    assert torch.equal(policy.get_parameter("model.model.embed_tokens.weight"), copy)


def test_weights_that_a_callback_changed_are_kept(tmp_path: Path) -> None:
    class Change(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                with torch.no_grad():
                    pl_module.policy.token_emb.weight[3].fill_(7.0)

    module = SFTModule(tiny_palm())
    trainer(tmp_path, precision="bf16-true", max_epochs=3, callbacks=[Change()]).fit(module, loader([SFT_BATCH]))
    row = masters(module)["policy.token_emb.weight"][3]
    assert float((row - 7).abs().max()) < 0.01 and bool((row != 7).any()), "it trained on from the new value"
    others = masters(module)["policy.token_emb.weight"][4:]
    assert bool((others != others.bfloat16().float()).any()), "the other rows keep their copies"


def test_weights_in_float32_have_no_copies(tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed", "64-true"):
        module = SFTModule(tiny_palm())
        trainer(tmp_path, precision=precision).fit(module, loader([SFT_BATCH]))
        assert not module.masters.of
        own = {id(p) for p in module.policy.parameters()}
        assert {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]} == own


def test_the_share_of_lost_updates_is_that_of_the_roundings() -> None:
    """Against adding the learning rate to the weights."""
    weights = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for lr in (1e-4, 1e-3, 3e-3, 1e-2):
        same = [(weights + sign * lr).eq(weights).float().mean() for sign in (1, -1)]
        share = share_lost(torch.optim.SGD([torch.nn.Parameter(weights)], lr=lr))
        # A weight at a power of two is nearer to the number below.
        assert share == pytest.approx(float(sum(same)) / 2, abs=0.01)
    assert share_lost(torch.optim.SGD([torch.nn.Parameter(weights.float())], lr=1e-9)) == 0


class OwnOptimizer(SFTModule):
    """A user's module that makes its optimizer by itself."""

    rate = 1e-5

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.policy.parameters(), lr=self.rate)


@pytest.mark.parametrize("rate", [1e-5, 0.1])
def test_an_optimizer_of_narrow_weights_is_warned_about(rate: float, tmp_path: Path) -> None:
    module = OwnOptimizer(tiny_palm())
    module.rate = rate
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, precision="bf16-true").fit(module, loader([SFT_BATCH]))
    found = [str(w.message) for w in told if "below the resolution of" in str(w.message)]
    assert len(found) == (rate < 0.01)
    for message in found:
        assert "argument `optimizer`" in message and "bf16-mixed" in message


def test_stale_gradients_of_a_stopped_fit_are_dropped() -> None:
    model = tiny_palm(dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    copies = MasterWeights()
    copies.create(model.named_parameters())
    copies.collect()
    assert all(master.grad is None for master in copies.of.values())
