"""References that move: the rule, the precision, the steps it follows, and what a checkpoint keeps of it."""

import copy
import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ema_pytorch import EMA
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig, add_lora, lora_parameters, train_only
from lightning_align.references.average import Average
from lightning_align.references.moving import MovingAdapters, MovingCopy
from lightning_align.references.update import ReferenceUpdate
from tests.toys import largest_difference, preference_batch, split, state_of, tiny_palm, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SGD = functools.partial(torch.optim.SGD, lr=0.05)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
BATCHES = split(preference_batch(8), 2)
LORA = LoRAConfig(rank=2, targets=["in_proj"])


def trainer(folder: Path, *callbacks: Callback, **arguments: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "default_root_dir": folder}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    defaults = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": saves, **quiet}
    return L.Trainer(**{**defaults, **arguments}, callbacks=list(callbacks))


def loader() -> DataLoader[Any]:
    return DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def module(*, lora: bool = False, optimizer: Any = SGD, **given: Any) -> DPOModule:
    given = {"reference": "moving", "lora": LORA if lora else None, **given}
    return DPOModule(given.pop("backbone", None) or tiny_palm(), optimizer=optimizer, **given)


def average(model: DPOModule) -> dict[str, Tensor]:
    return state_of(model.reference_average.model)


class Policies(Callback):
    """Keeps what the policy was after each optimizer step."""

    def __init__(self, lora: bool) -> None:
        self.lora, self.states, self.training = lora, [], set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        policy: Any = pl_module.policy

        def keep(*_: Any) -> None:
            self.states.append(trained(policy) if self.lora else state_of(policy))

        keep()
        trainer.optimizers[0].register_step_post_hook(keep)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        pl_module.train()  # as user code may


def trained(policy: nn.Module) -> dict[str, Tensor]:
    """The adapters that train, by the names that their average has."""
    state = {name: value for name, value in state_of(policy).items() if ".lora.default." in name}
    return {
        name.replace(".lora.default", "").rpartition(".")[0].replace(".", "/") + f".{name[-1]}": state[name] for name in state
    }


def recursion(states: list[dict[str, Tensor]], *, alpha: float, every: int) -> dict[str, Tensor]:
    """The reference after the last of these policies, in float64, one weight at a time; the first is the beginning."""
    reference = {name: value.double() for name, value in states[0].items()}
    for step, state in enumerate(states[1:], start=1):
        if step % every == 0:
            reference = {name: alpha * state[name].double() + (1 - alpha) * reference[name] for name in reference}
    return reference


# -- the rule


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.01])
def test_the_average_is_the_recursion(alpha: float) -> None:
    model = tiny_palm()
    follower = Average(copy.deepcopy(model))
    states = [state_of(model)]
    for _ in range(30):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        states.append(state_of(model))
        follower.follow(model, alpha=alpha)
    assert largest_difference(state_of(follower.model), recursion(states, alpha=alpha, every=1)) < 2e-6
    assert (largest_difference(state_of(follower.model), state_of(model)) == 0) is (alpha == 1)


def test_small_steps_add_up_where_the_policy_is_in_bfloat16() -> None:
    """Closed form: from 1 towards 1.0469 by a thousandth 2,000 times; in bfloat16 not even the first step would count."""
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    follower = Average(model)
    nn.init.constant_(model.weight, 1.05)
    target = float(model.weight.detach()[0, 0])
    for _ in range(2000):
        follower.follow(model, alpha=0.001)
    assert follower.model.weight.dtype is torch.float32
    torch.testing.assert_close(
        follower.model.weight, torch.full((2, 2), 1 + (target - 1) * (1 - 0.999**2000)), rtol=1e-5, atol=0
    )


def test_it_stays_in_float32() -> None:
    owner = nn.Module()
    owner.average = Average(tiny_palm())
    before = state_of(owner.average)
    owner.to(torch.bfloat16)
    assert all(p.dtype is torch.float32 for p in owner.average.parameters())
    assert largest_difference(state_of(owner.average), before) == 0


def test_integers_are_copied() -> None:
    model = nn.BatchNorm1d(3)
    follower = Average(copy.deepcopy(model))
    model(torch.randn(5, 3))
    follower.follow(model, alpha=0.5)
    assert follower.model.num_batches_tracked == 1


def test_a_weight_without_a_partner_is_refused() -> None:
    follower = Average(tiny_palm())
    renamed, more, reshaped = nn.Module(), tiny_palm(), tiny_palm(dim_head=4)
    renamed.inner = tiny_palm()
    more.extra = nn.Linear(2, 2)
    for model, message in (
        (renamed, r"Only the policy has inner.*, and only the reference has blocks"),
        (more, r"Only the policy has extra.bias \(2,\), extra.weight \(2, 2\), and only the reference has nothing"),
        (reshaped, r"Only the policy has blocks.0.*, and only the reference has blocks.0"),
    ):
        with pytest.raises(ValueError, match=message):
            follower.follow(model, alpha=0.5)


def test_adapters_are_a_scope_and_no_model() -> None:
    policy = tiny_palm()
    add_lora(policy, LORA)
    train_only(policy, "default")
    before = sum(p.numel() for p in policy.parameters())
    reference = MovingAdapters(policy, LORA)
    adapters = sum(p.numel() for p in lora_parameters(policy, "default"))
    assert sum(p.numel() for p in policy.parameters()) == before + adapters
    assert sum(p.numel() for p in reference.average.parameters()) == adapters
    batch = token_batch([2, 3], [4, 1])
    plain = MovingCopy(tiny_palm()).logprobs(policy, batch).sums
    assert torch.equal(reference.logprobs(policy, batch).sums, plain)
    with torch.no_grad():
        for parameter in lora_parameters(policy, "default"):
            parameter.normal_()
    assert torch.equal(reference.logprobs(policy, batch).sums, plain)
    reference.update(policy, alpha=1.0)
    with torch.no_grad():
        policy.eval()
        expected = MovingCopy(policy).logprobs(policy, batch).sums
    assert torch.equal(reference.logprobs(policy, batch).sums, expected) and not torch.equal(expected, plain)


# -- with a Trainer


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("alpha", "every", "accumulate"), [(1.0, 3, 1), (0.6, 2, 1), (0.1, 1, 2)])
def test_it_follows_optimizer_steps(lora: bool, alpha: float, every: int, accumulate: int, tmp_path: Path) -> None:
    model, seen = module(lora=lora, optimizer=ADAMW), Policies(lora)
    update = ReferenceUpdate(alpha=alpha, every=every)
    trainer(tmp_path, seen, update, max_epochs=2, accumulate_grad_batches=accumulate).fit(model, loader())
    assert update.steps == model.trainer.global_step == 8 // accumulate == len(seen.states) - 1
    assert largest_difference(average(model), recursion(seen.states, alpha=alpha, every=every)) < 1e-6
    assert largest_difference(average(model), seen.states[0]) > 1e-3
    assert not any(p.requires_grad for p in model.reference_average.parameters())
    trainable = {id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    assert trainable == {id(p) for p in model.parameters() if p.requires_grad}


RULES: list[dict[str, Any]] = [
    {"alpha": 0.1, "every": 1, "inv_gamma": 1.0},
    {"alpha": 0.3, "every": 1, "update_after_step": 3, "inv_gamma": 2.0, "power": 0.75, "min_value": 0.2},
    {"alpha": 0.3, "every": 2, "update_after_step": 5, "inv_gamma": 0.5},
    {"alpha": 0.2, "every": 3, "update_after_step": 4},
]


@pytest.mark.parametrize("rule", RULES)
def test_the_options_of_ema_pytorch(rule: dict[str, Any], tmp_path: Path) -> None:
    """The decays as ema-pytorch documents them, in float64, and the average of ema-pytorch itself."""
    model, seen = module(optimizer=ADAMW), Policies(lora=False)
    update = ReferenceUpdate(**rule)
    trainer(tmp_path, seen, update, max_epochs=5).fit(model, loader())
    after, gamma = rule.get("update_after_step", 0), rule.get("inv_gamma")
    expected = {name: value.double() for name, value in seen.states[0].items()}
    for step, state in enumerate(seen.states[1:], start=1):
        if step % rule["every"]:
            continue
        decay = 1 - rule["alpha"]
        if step <= after:
            decay = 0.0
        elif gamma is not None:
            grown = 1 - (1 + (step - after - 1) / gamma) ** -rule.get("power", 2 / 3)
            decay = min(max(grown, rule.get("min_value", 0.0)), decay) if step > after + 1 else 0.0
        expected = {name: decay * expected[name] + (1 - decay) * state[name].double() for name in expected}
    assert largest_difference(average(model), expected) < 1e-6
    assert len(seen.states) == 21
    if rule["every"] == 1:  # with other intervals, ema-pytorch updates after the first step, the callback after the last
        online = tiny_palm()
        given = {
            name: value for name, value in rule.items() if name in ("update_after_step", "inv_gamma", "power", "min_value")
        }
        ema = EMA(online, beta=1 - rule["alpha"], update_every=1, **{"update_after_step": 0, **given})
        for state in seen.states[1:]:
            online.load_state_dict(state)
            ema.update()
        assert largest_difference(average(model), state_of(ema.ema_model)) < 1e-6


def test_the_names_of_ema_pytorch() -> None:
    given = {"beta": 0.9, "update_every": 1, "update_after_step": 5, "inv_gamma": 2.0, "power": 0.75, "min_value": 0.3}
    update = ReferenceUpdate(**given)
    ema = EMA(nn.Linear(1, 1), **given)
    for step in range(1, 60):
        ema.update()  # counts the step first
        assert update.alpha_at(step) == pytest.approx(1 - ema.get_current_decay(), abs=1e-6), step
    assert update.every == 1 and ReferenceUpdate().every == 512


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"update_after_step": -1}, "`update_after_step` must be at least 0, but got -1"),
        ({"inv_gamma": 0.0}, "`inv_gamma` must be above 0, or null for no warm-up, but got 0.0"),
        ({"beta": 1.0}, "`beta` must be at least 0 and below 1, but got 1.0. With 1 the average would never move"),
        ({"power": 0.0}, "`power` must be above 0, but got 0.0"),
        ({"alpha": 0.6, "min_value": 0.5}, "`min_value` must be from 0 to the final decay 1 - `alpha` = 0.4, but got 0.5"),
    ],
)
def test_options_out_of_range_raise(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceUpdate(**rule)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(lora: bool, tmp_path: Path) -> None:
    """Stopped at a step between two updates."""

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)

    whole, first, second = (module(lora=lora, optimizer=ADAMW) for _ in range(3))
    torch.manual_seed(0)  # the adapters begin at random
    trainer(tmp_path, ReferenceUpdate(alpha=0.3, every=3), max_epochs=3).fit(whole, loader())
    torch.manual_seed(0)
    trainer(tmp_path, ReferenceUpdate(alpha=0.3, every=3), keep(), max_steps=4).fit(first, loader())
    resumed = trainer(tmp_path, ReferenceUpdate(alpha=0.3, every=3), keep(), max_epochs=3)
    resumed.fit(second, loader(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)
    assert second.trainer.global_step == 12
    assert largest_difference(average(whole), average(second)) == 0
    assert largest_difference(state_of(whole.policy), state_of(second.policy)) == 0
    assert largest_difference(average(first), average(second)) > 1e-3
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    averages = {name for name in saved if name.startswith("reference_average.")}
    assert len(averages) == len(average(first))
    assert len(saved) == 2 * len(averages), "the policy, or its adapters, and their average; nothing twice"


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_there_when_the_checkpoint_is_loaded(lora: bool, tmp_path: Path) -> None:
    base = DPOModule(tiny_palm())
    base.configure_model()
    torch.save({"state_dict": base.state_dict(), "hyper_parameters": dict(base.hparams)}, tmp_path / "base.ckpt")
    start = str(tmp_path / "base.ckpt")
    model = DPOModule(init_from=start, reference="moving", lora=LORA if lora else None, optimizer=ADAMW)
    trainer(tmp_path, ReferenceUpdate(alpha=0.5, every=1), max_epochs=2).fit(model, loader())
    model.trainer.save_checkpoint(tmp_path / "moved.ckpt")
    loaded = DPOModule.load_from_checkpoint(tmp_path / "moved.ckpt", weights_only=True)
    assert largest_difference(average(model), average(loaded)) == 0
    (expected,) = trainer(tmp_path).validate(model, loader(), verbose=False)
    (values,) = trainer(tmp_path).validate(loaded, loader(), verbose=False)
    assert values == expected and values["val/rewards/margins"] != 0
    further = DPOModule(init_from=str(tmp_path / "moved.ckpt"))
    further.configure_model()  # without the adapters of the reference
    torch.testing.assert_close(
        further(BATCHES[0]["chosen"]["tokens"]), model(BATCHES[0]["chosen"]["tokens"]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_in_any_precision(lora: bool, precision: Any, seed: int, tmp_path: Path) -> None:
    model: DPOModule = module(lora=lora, optimizer=ADAMW)
    rewards: list[float] = []

    class Rewards(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            rewards.append(float(trainer.callback_metrics["train/rewards/chosen"]))

    trainer(tmp_path, Rewards(), ReferenceUpdate(alpha=0.01, every=1), precision=precision, max_epochs=2).fit(model, loader())
    assert rewards[0] == 0 and rewards[-1] != 0
    assert {p.dtype for p in model.reference_average.parameters()} == {
        torch.float64 if precision == "64-true" else torch.float32
    }
    torch.manual_seed(seed)  # the adapters begin at random
    start = module(lora=lora)
    start.configure_model()
    # A step of Adam at this rate is 0.03 at most, however it rounds; of eight, the average takes 0.01 each time: 0.012 at most.
    assert 0 < largest_difference(average(model), average(start)) < 0.012


@pytest.mark.filterwarnings("ignore:the first batch.*dropout")
def test_dropout_does_not_reach_it(tmp_path: Path) -> None:
    model = module(backbone=tiny_palm(ff_dropout=0.5, attn_dropout=0.5))
    trainer(tmp_path, ReferenceUpdate(), Policies(False)).fit(model, loader())
    assert all(part.training for part in model.modules())
    first, second = (model.reference.logprobs(model.policy, BATCHES[0]["chosen"]).sums for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert all(part.training for part in model.modules())


def test_a_module_with_one_can_be_copied(tmp_path: Path) -> None:
    model = module()
    trainer(tmp_path, ReferenceUpdate(alpha=0.5, every=1)).fit(model, loader())
    twin = copy.deepcopy(model)
    twin.reference.update(twin.policy, alpha=1.0)  # type: ignore[attr-defined]  # a MovingCopy
    assert largest_difference(average(twin), state_of(twin.policy)) == 0
    assert largest_difference(average(model), state_of(model.policy)) > 1e-4


# -- what is refused


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference of DPOModule is a FrozenCopy, which does not move"):
        trainer(tmp_path, ReferenceUpdate()).fit(module(reference="frozen"), loader())
    with pytest.raises(ValueError, match=r"no callback moves it\. Add the callback ReferenceUpdate"):
        trainer(tmp_path).fit(module(), loader())
    for alpha in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`alpha` must be above 0"):
            ReferenceUpdate(alpha=alpha)
    with pytest.raises(ValueError, match="`every` must be at least 1, but got 0"):
        ReferenceUpdate(every=0)
    with pytest.raises(ValueError, match="but got 'ema'"):
        module(reference="ema")


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = module()
    trainer(tmp_path, ReferenceUpdate()).fit(model, loader())
    model.trainer.save_checkpoint(tmp_path / "moving.ckpt")
    with pytest.raises(ValueError, match="has reference: frozen, but the checkpoint is of a run with reference: moving"):
        trainer(tmp_path, max_epochs=2).fit(module(reference="frozen"), loader(), ckpt_path=tmp_path / "moving.ckpt")
