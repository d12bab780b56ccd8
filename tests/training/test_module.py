"""SFTModule and DPOModule with a bare Trainer: gradients, what is saved, what is logged, and foreign models."""

import functools
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align.dpo.batch import concatenate
from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.palm import PaLM
from lightning_align.models.weights import weights_hash
from lightning_align.scoring.sums import response_logprobs
from lightning_align.sft.module import SFTModule
from lightning_align.training.schedules import WarmupDecay
from tests.toys import (
    Plain,
    largest_difference,
    preference_batch,
    slow_logprobs,
    split,
    state_of,
    tiny_palm,
    token_batch,
)

# Training without validating is what most of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SGD = functools.partial(torch.optim.SGD, lr=0.05)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)
# Response lengths that differ much between the halves: a mean of means is then not the mean.
SFT_BATCH = token_batch([2, 1, 3, 2, 1, 2, 3, 1], [9, 8, 1, 7, 1, 1, 2, 1])
DPO_BATCH = preference_batch(8)
MODULES: dict[str, Any] = {
    "sft": lambda **given: SFTModule(given.pop("backbone", None) or tiny_palm(), **given),
    "dpo": lambda **given: DPOModule(given.pop("backbone", None) or tiny_palm(), **{"sft_weight": 0.3, **given}),
}
BATCHES: dict[str, Any] = {"sft": SFT_BATCH, "dpo": DPO_BATCH}
METHODS = pytest.mark.parametrize("method", ["sft", "dpo"])


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def trainer(folder: Path, **arguments: Any) -> L.Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return L.Trainer(**{**defaults, **quiet, "log_every_n_steps": 1, **arguments})


def fit(method: str, folder: Path, *, size: int = 8, given: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """Train on the method's eight rows cut into micro-batches of a size; every micro-batch of an epoch accumulates."""
    module = MODULES[method](optimizer=SGD, **(given or {}))
    batches = split(BATCHES[method], size)
    arguments = {"max_epochs": 2, "accumulate_grad_batches": len(batches), **arguments}
    trainer(folder, **arguments).fit(module, loader(batches))
    return module


# -- gradients


@METHODS
@pytest.mark.parametrize("clip", [None, 0.05])
def test_one_optimizer_batch_gives_one_gradient(method: str, clip: float | None, tmp_path: Path) -> None:
    """Eight rows at once, as two of four, as eight of one; with clipping too, which must see the same gradient."""
    start = tiny_palm().state_dict()
    states = [state_of(fit(method, tmp_path, size=size, gradient_clip_val=clip).policy) for size in (8, 4, 1)]
    assert largest_difference(states[0], start) > 1e-4
    for state in states[1:]:
        assert largest_difference(states[0], state) < 1e-6


@METHODS
def test_a_last_window_that_is_not_full_counts_what_it_has(method: str, tmp_path: Path) -> None:
    """Batches of 2, 3 and 3 rows, accumulated by two: steps of 5 and of 3 rows."""
    batch = BATCHES[method]
    whole = split(batch, 1)

    def join(rows: list[Any]) -> Any:
        if method == "dpo":
            return {side: join_rows([row[side] for row in rows]) for side in ("chosen", "rejected")}
        return join_rows(rows)

    def join_rows(rows: list[Any]) -> Any:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    cuts = {2: [join(whole[:2]), join(whole[2:5]), join(whole[5:])], 1: [join(whole[:5]), join(whole[5:])]}
    states = []
    for accumulate, batches in cuts.items():
        module = MODULES[method](optimizer=SGD)
        trainer(tmp_path, accumulate_grad_batches=accumulate).fit(module, loader(batches))
        assert module.trainer.global_step == 2
        states.append(state_of(module.policy))
    assert largest_difference(*states) < 1e-6


def test_a_schedule_that_waits_for_a_metric_gets_it(tmp_path: Path) -> None:
    waits: Any = functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=1e9, factor=0.5)
    module, batches = SFTModule(tiny_palm(), optimizer=SGD, lr_scheduler=waits), loader(split(SFT_BATCH, 4))
    trainer(tmp_path, max_epochs=3).fit(module, batches, batches)
    # No value is better by so much, so each validation halves the rate.
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 8)


def test_the_throughput_is_that_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each step takes two seconds and each validation a thousand."""
    now, rates = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += 2

        def on_validation_epoch_end(self, *_: Any) -> None:
            now[0] += 1000

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(float(trainer.callback_metrics.get("train/tokens_per_second", math.nan)))

    module, batches = SFTModule(tiny_palm(), optimizer=SGD), loader(split(SFT_BATCH, 4))
    arguments: dict[str, Any] = {"max_epochs": 3, "val_check_interval": 1, "num_sanity_val_steps": 0}
    trainer(tmp_path, callbacks=[Clock()], logger=CSVLogger(tmp_path), **arguments).fit(module, batches, batches)
    tokens = [int(part["mask"].sum()) for part in split(SFT_BATCH, 4)]
    # Nothing before the first step; and a callback sees what was logged when the step before it ended.
    assert rates[2:] == [tokens[step % 2] / 2 for step in range(1, 5)]


@METHODS
def test_a_fit_that_was_stopped_inside_an_accumulation_leaves_the_next_one_alone(method: str, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stopped")

    states = []
    for stopped in (False, True):
        module = MODULES[method](optimizer=SGD)
        batches = split(BATCHES[method], 4)
        if stopped:
            with pytest.raises(RuntimeError, match="stopped"):
                trainer(tmp_path, accumulate_grad_batches=2, callbacks=[Stop()]).fit(module, loader(batches))
        trainer(tmp_path, accumulate_grad_batches=2).fit(module, loader(batches))
        states.append(state_of(module.policy))
    assert largest_difference(*states) == 0


class Gradients(Callback):
    """Keeps the gradients that the optimizer sees, and the metrics of the step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def keep(*_: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

        trainer.optimizers[0].register_step_post_hook(keep)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def hand_loss(method: str, policy: nn.Module, reference: nn.Module, batch: Any) -> Tensor:
    """The loss of the whole batch, with plain log-softmax on full logits, with its graph."""

    def sums(model: nn.Module, rows: Any) -> tuple[Tensor, Tensor]:
        logps = model(rows["tokens"])[:, :-1].log_softmax(-1).gather(2, rows["tokens"][:, 1:, None]).squeeze(2)
        targets = rows["targets"][:, 1:]
        return (logps * targets).sum(1), targets.sum(1)

    if method == "sft":
        total, counts = sums(policy, batch)
        return -total.sum() / counts.sum()
    (w, nw), (l, _) = sums(policy, batch["chosen"]), sums(policy, batch["rejected"])  # noqa: E741
    (rw, _), (rl, _) = sums(reference, batch["chosen"]), sums(reference, batch["rejected"])
    return (-nn.functional.logsigmoid(0.1 * ((w - rw) - (l - rl))) - 0.3 * w / nw).mean()


@METHODS
def test_the_gradient_and_the_loss_are_those_by_hand(method: str, tmp_path: Path) -> None:
    policy, reference = tiny_palm(), tiny_palm().requires_grad_(False)
    loss = hand_loss(method, policy, reference, BATCHES[method])
    loss.backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None]))
    for size in (8, 2):
        seen = Gradients()
        fit(method, tmp_path, size=size, max_epochs=1, callbacks=[seen])
        assert seen.norms == [pytest.approx(norm, rel=1e-4)]
        assert seen.metrics[-1]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    seen = Gradients()
    fit(method, tmp_path, max_epochs=1, callbacks=[seen])
    assert seen.metrics[0]["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    seen = Gradients()
    fit(method, tmp_path, size=1, max_epochs=1, callbacks=[seen], gradient_clip_val=norm / 10)
    assert seen.norms == [pytest.approx(norm / 10, rel=1e-4)]  # clipped after the division, so to the mean's scale


def test_dpo_starts_at_log_two_with_rewards_of_zero(tmp_path: Path) -> None:
    seen = Gradients()
    fit("dpo", tmp_path, given={"sft_weight": 0.0}, max_epochs=1, callbacks=[seen])
    (first,) = seen.metrics
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [first[f"train/rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")] == [0, 0, 0, 0]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("given", ["module", "factory"])
def test_in_any_precision_the_reference_begins_as_the_policy(precision: Any, given: str, tmp_path: Path) -> None:
    """Dropout is the one difference at the start that there could be, so there is none."""
    seen = Gradients()
    module = DPOModule(tiny_palm() if given == "module" else tiny_palm, optimizer=SGD)
    trainer(tmp_path, precision=precision, callbacks=[seen]).fit(module, loader([DPO_BATCH]))
    assert seen.metrics[0]["train/rewards/chosen"] == seen.metrics[0]["train/rewards/rejected"] == 0
    assert math.isfinite(seen.metrics[0]["train/grad_norm"])


# -- the reference


class EveryHook(Callback):
    """Does to the module what user code may do."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        pl_module.train()


@pytest.mark.filterwarnings("ignore:the first batch.*dropout")
def test_the_reference_stays_as_it_was(tmp_path: Path) -> None:
    module = DPOModule(tiny_palm(ff_dropout=0.5, attn_dropout=0.5), optimizer=SGD)
    batches = split(DPO_BATCH, 2)
    trainer(tmp_path, max_epochs=3, callbacks=[EveryHook()]).fit(module, loader(batches), loader(batches))
    reference = module.reference.model  # type: ignore[attr-defined]  # a FrozenCopy
    assert weights_hash(reference) == weights_hash(tiny_palm())
    assert largest_difference(state_of(module.policy), state_of(reference)) > 1e-4
    assert not any(part.training for part in reference.modules())
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    in_module = {id(p) for p in module.parameters()} | {id(p) for p in module.trainer.optimizers[0].param_groups[0]["params"]}
    assert in_module.isdisjoint(id(p) for p in reference.parameters())


@pytest.mark.parametrize("kind", ["frozen", "stored", "lora"])
def test_after_many_steps_the_reference_says_what_it_said(kind: str, tmp_path: Path) -> None:
    """Bit for bit, with weight decay, momentum and validation between; a benchmark does it for a thousand steps."""
    model = tiny_palm(depth=1)
    given = {
        "frozen": {},
        "stored": {"reference": "stored", "reference_cache": str(tmp_path)},
        "lora": {"lora": LoRAConfig(rank=2)},
    }[kind]
    module = DPOModule(model, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2), **given)  # type: ignore[arg-type]
    both = concatenate(DPO_BATCH)
    with torch.no_grad():
        before = response_logprobs(tiny_palm(depth=1), both).sums
    trainer(tmp_path, max_epochs=2).fit(module, loader([DPO_BATCH] * 50), loader([DPO_BATCH]))
    assert module.trainer.global_step == 100
    assert torch.equal(module.reference.logprobs(module.policy, both).sums, before)
    with torch.no_grad():
        assert float((response_logprobs(module.policy, both).sums - before).abs().max()) > 1


def test_a_checkpoint_holds_policy_and_optimizer_and_nothing_else_of_size(tmp_path: Path) -> None:
    """At most 1.01 times their bytes with a frozen reference; with adapters at most 3 % of that."""
    sizes = {}
    for name, lora in (("full", None), ("lora", LoRAConfig(rank=2, targets=["in_proj"]))):
        # So wide and deep that the weights, and not what describes them, are what a file consists of.
        model = PaLM(num_tokens=256, dim=128, depth=4, heads=2)
        module = DPOModule(model, lora=lora, optimizer=ADAMW)
        run = trainer(tmp_path)
        run.fit(module, loader([DPO_BATCH]))
        run.save_checkpoint(tmp_path / name)
        sizes[name] = (tmp_path / name).stat().st_size
        if lora is None:
            states = [value for state in run.optimizers[0].state.values() for value in state.values()]
            tensors = [*module.policy.parameters(), *states]
            assert sizes[name] <= 1.01 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sizes["lora"] <= 0.03 * sizes["full"]


def test_only_what_trains_reaches_the_optimizer_and_vectors_without_decay(tmp_path: Path) -> None:
    module = SFTModule(tiny_palm(qk_rmsnorm=True), lora=LoRAConfig(rank=2), optimizer=ADAMW)
    trainer(tmp_path).fit(module, loader([SFT_BATCH]))
    groups = module.trainer.optimizers[0].param_groups
    trained = {id(p) for name, p in module.policy.named_parameters() if ".lora." in name}
    assert {id(p) for group in groups for p in group["params"]} == trained
    module = SFTModule(tiny_palm(qk_rmsnorm=True))
    trainer(tmp_path).fit(module, loader([SFT_BATCH]))
    matrices, vectors = module.trainer.optimizers[0].param_groups
    assert {p.ndim for p in matrices["params"]} == {2} and matrices["weight_decay"] > 0
    assert {p.ndim for p in vectors["params"]} == {1} and vectors["weight_decay"] == 0
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.policy.parameters()))


def test_the_model_is_configured_once() -> None:
    module = DPOModule(tiny_palm)
    module.configure_model()
    policy, reference = module.policy, module.reference
    module.configure_model()
    assert module.policy is policy and module.reference is reference


# -- checkpoints


@METHODS
def test_a_checkpoint_reloads_with_nothing_else(method: str, tmp_path: Path) -> None:
    module = fit(method, tmp_path, given={"lr_scheduler": functools.partial(WarmupDecay, total_steps=4)})
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    names = set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert names == {f"policy.{name}" for name in tiny_palm().state_dict()}  # no reference, no metric
    loaded = type(module).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert isinstance(loaded.policy, PaLM)
    torch.testing.assert_close(loaded(SFT_BATCH["tokens"]), module(SFT_BATCH["tokens"]), rtol=0, atol=0)
    assert loaded.hparams == module.hparams | {"backbone": loaded.hparams["backbone"]}


def test_a_module_without_its_reference_does_not_make_one_up(tmp_path: Path) -> None:
    """What is rebuilt from a checkpoint of a policy given as a module has that module's sizes, but no longer its weights."""
    module = fit("dpo", tmp_path)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DPOModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="The reference of this checkpoint cannot be made"):
        trainer(tmp_path).validate(loaded, loader([DPO_BATCH]), verbose=False)
    whole = DPOModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, backbone=tiny_palm())
    (got,) = trainer(tmp_path).validate(whole, loader([DPO_BATCH]), verbose=False)
    (expected,) = trainer(tmp_path).validate(module, loader([DPO_BATCH]), verbose=False)
    assert got == expected


def saved(method: str, folder: Path, **given: Any) -> Path:
    module = fit(method, folder, given=given)
    module.trainer.save_checkpoint(folder / f"{method}.ckpt")
    return folder / f"{method}.ckpt"


def test_dpo_begins_from_sft(tmp_path: Path) -> None:
    path = saved("sft", tmp_path)
    module = DPOModule(init_from=str(path), optimizer=SGD)
    trainer(tmp_path).fit(module, loader([DPO_BATCH]))
    sft = SFTModule.load_from_checkpoint(path, weights_only=True)
    assert weights_hash(module.reference.model) == weights_hash(sft.policy)  # type: ignore[attr-defined]
    assert weights_hash(module.policy) != weights_hash(sft.policy)
    module.trainer.save_checkpoint(tmp_path / "dpo.ckpt")
    loaded = DPOModule.load_from_checkpoint(tmp_path / "dpo.ckpt", weights_only=True)
    torch.testing.assert_close(loaded(SFT_BATCH["tokens"]), module(SFT_BATCH["tokens"]), rtol=0, atol=0)
    assert weights_hash(loaded.reference.model) == weights_hash(sft.policy)  # type: ignore[attr-defined]


@METHODS
def test_a_lora_checkpoint_holds_what_trains(method: str, tmp_path: Path) -> None:
    base = saved("sft", tmp_path)
    kind = {"sft": SFTModule, "dpo": DPOModule}[method]
    module = kind(init_from=str(base), lora=LoRAConfig(rank=2, targets=["in_proj"]), optimizer=SGD)
    start = state_of(SFTModule.load_from_checkpoint(base, weights_only=True).policy)
    trainer(tmp_path, max_epochs=2).fit(module, loader(split(BATCHES[method], 4)))
    assert largest_difference({n: v for n, v in state_of(module.policy).items() if ".lora." not in n}, start) == 0
    module.trainer.save_checkpoint(tmp_path / "lora.ckpt")
    names = list(torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"])
    assert len(names) == 4 and all(".lora." in name for name in names)
    loaded = kind.load_from_checkpoint(tmp_path / "lora.ckpt", weights_only=True)
    torch.testing.assert_close(loaded(SFT_BATCH["tokens"]), module(SFT_BATCH["tokens"]), rtol=0, atol=0)
    # And a run resumes from it.
    again = kind(init_from=str(base), lora=LoRAConfig(rank=2, targets=["in_proj"]), optimizer=SGD)
    trainer(tmp_path, max_epochs=3).fit(again, loader(split(BATCHES[method], 4)), ckpt_path=tmp_path / "lora.ckpt")
    assert largest_difference(state_of(again.policy), state_of(module.policy)) > 1e-6


def test_lora_on_a_base_that_no_checkpoint_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="Give the base model's weights as `init_from`"):
        SFTModule(tiny_palm, lora=LoRAConfig()).configure_model()


def test_another_reference_is_refused(tmp_path: Path) -> None:
    path = saved("dpo", tmp_path)
    module = DPOModule(tiny_palm(seed=9), optimizer=SGD)
    with pytest.raises(ValueError, match="was trained against a reference with weights"):
        trainer(tmp_path, max_epochs=3).fit(module, loader([DPO_BATCH]), ckpt_path=path)


@METHODS
def test_a_resumed_run_is_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    """From the end of an epoch: these loaders cannot start in the middle of one."""
    batches = split(BATCHES[method], 2)

    def module() -> Any:
        lr_scheduler = functools.partial(WarmupDecay, total_steps=8, warmup_steps=2)
        return MODULES[method](optimizer=ADAMW, lr_scheduler=lr_scheduler)

    whole, first, second = module(), module(), module()
    trainer(tmp_path, max_epochs=2).fit(whole, loader(batches))
    keep = ModelCheckpoint(tmp_path, filename="four", every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, max_steps=4, enable_checkpointing=True, callbacks=[keep]).fit(first, loader(batches))
    resumed = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[keep])
    resumed.fit(second, loader(batches), ckpt_path=tmp_path / "four.ckpt")
    assert second.trainer.global_step == 8
    assert largest_difference(state_of(whole.policy), state_of(second.policy)) == 0


def test_nothing_to_build_is_refused() -> None:
    for kind in (SFTModule, DPOModule):
        with pytest.raises(ValueError, match="needs `backbone`"):
            kind()
    with pytest.raises(ValueError, match="`sft_weight` must be 0 or more, but got -1"):
        DPOModule(tiny_palm, sft_weight=-1)
    with pytest.raises(ValueError, match="the ipo loss has none"):
        DPOModule(tiny_palm, loss="ipo", label_smoothing=0.1)


# -- foreign models


def x_transformers_model() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    decoder = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    model: nn.Module = TransformerWrapper(num_tokens=23, max_seq_len=32, attn_layers=decoder)
    return model


@METHODS
@pytest.mark.parametrize("build", [x_transformers_model, lambda: Plain(tiny_palm())], ids=["x-transformers", "plain"])
def test_any_module_that_gives_logits_will_do(method: str, build: Any, tmp_path: Path) -> None:
    model, seen = build(), Gradients()
    batch = BATCHES[method]
    expected = hand_loss(method, model, build().requires_grad_(False) if method == "sft" else model, batch)
    module = MODULES[method](backbone=model, optimizer=SGD)
    trainer(tmp_path, max_epochs=2, callbacks=[seen]).fit(module, loader([batch]), loader([batch]))
    assert seen.metrics[0]["train/loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert seen.metrics[1]["train/loss"] < seen.metrics[0]["train/loss"]


# -- what is logged


def test_validation_is_exact_for_any_cut(tmp_path: Path) -> None:
    sums, counts = slow_logprobs(tiny_palm(), SFT_BATCH)
    nats = -sum(sums) / sum(counts)
    for size in (8, 3, 1):
        (values,) = trainer(tmp_path).validate(SFTModule(tiny_palm()), loader(split(SFT_BATCH, size)), verbose=False)
        assert values == pytest.approx(
            {"val/loss": nats, "val/perplexity": math.exp(nats), "val/bits_per_byte": nats / 3 / math.log(2)}, rel=1e-5
        )
    (values,) = trainer(tmp_path).test(SFTModule(tiny_palm()), loader([SFT_BATCH]), verbose=False)
    assert values["test/loss"] == pytest.approx(nats, rel=1e-5)


def test_dpo_validation_is_exact_for_any_cut(tmp_path: Path) -> None:
    module = fit("dpo", tmp_path)
    reference = tiny_palm()
    rewards = {}
    for side in ("chosen", "rejected"):
        policy_sums, reference_sums = (slow_logprobs(model, DPO_BATCH[side])[0] for model in (module.policy, reference))
        rewards[side] = [0.1 * (p - r) for p, r in zip(policy_sums, reference_sums, strict=True)]
    margins = [w - l for w, l in zip(rewards["chosen"], rewards["rejected"], strict=True)]  # noqa: E741
    for size in (8, 3, 1):
        (values,) = trainer(tmp_path).validate(module, loader(split(DPO_BATCH, size)), verbose=False)
        assert values["val/rewards/chosen"] == pytest.approx(sum(rewards["chosen"]) / 8, rel=1e-3, abs=1e-5)
        assert values["val/rewards/margins"] == pytest.approx(sum(margins) / 8, rel=1e-3, abs=1e-5)
        assert values["val/rewards/accuracies"] == sum(m > 0 for m in margins) / 8
        loss = hand_loss("dpo", module.policy, reference, DPO_BATCH)
        assert values["val/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


@METHODS
def test_tensorboard_has_the_curves(method: str, tmp_path: Path) -> None:
    module = MODULES[method](optimizer=SGD)
    batches = split(BATCHES[method], 4)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    trainer(tmp_path, logger=logger, max_epochs=2).fit(module, loader(batches), loader(batches))
    logger.experiment.close()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    wanted = {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "train/padding_share", "val/loss"}
    if method == "sft":
        wanted |= {"val/perplexity", "val/bits_per_byte"}
    else:
        names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
        wanted |= {f"{s}/{n}" for s in ("train", "val") for n in [*names, "logps/chosen", "logps/rejected"]}
        assert events.Tags()["histograms"] == ["val/rewards/margins_histogram"]
    assert scalars - {"epoch"} == wanted
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]
    assert [event.step for event in events.Scalars("val/loss")][-2:] == [1, 3]
    cells = sum(batch["mask"].numel() for batch in split(SFT_BATCH, 4)) / 2
    share = 1 - int(split(SFT_BATCH, 4)[1]["mask"].sum()) / cells
    if method == "sft":
        assert events.Scalars("train/padding_share")[0].value == pytest.approx(share)


def test_csv_and_no_logger(tmp_path: Path) -> None:
    for logger in (CSVLogger(tmp_path), False):
        module = SFTModule(tiny_palm())
        trainer(tmp_path, logger=logger, max_epochs=2).fit(module, loader([SFT_BATCH]), loader([SFT_BATCH]))
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert {"train/loss", "val/loss"} <= set(text.splitlines()[0].split(","))


@METHODS
@pytest.mark.parametrize(
    "arguments",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 1},
        {"limit_val_batches": 0},
        {"val_check_interval": 0.5},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"log_every_n_steps": 0},
        {"accumulate_grad_batches": 3},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_the_trainers_own_options_work(method: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    module = MODULES[method]()
    batches = split(BATCHES[method], 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*You requested to overfit but enabled training dataloader shuffling")
        trainer(tmp_path, **arguments).fit(module, loader(batches), loader(batches))
    assert all(bool(p.isfinite().all()) for p in module.policy.parameters())
    assert largest_difference(state_of(module.policy), state_of(tiny_palm())) > 0


# -- small things


def test_sides_of_unequal_width_are_joined() -> None:
    chosen, rejected = token_batch([2, 1], [3, 6]), token_batch([2, 1], [1, 1])
    both = concatenate({"chosen": chosen, "rejected": rejected})
    assert both["tokens"].shape == (4, 7)
    model = tiny_palm()
    expected = [*slow_logprobs(model, chosen)[0], *slow_logprobs(model, rejected)[0]]
    torch.testing.assert_close(response_logprobs(model, both).sums, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_predicting_continues_prompts_and_scores_pairs(tmp_path: Path) -> None:
    from lightning_align.generation.sampler import Generation, GenerationConfig, generate

    config = GenerationConfig(max_new_tokens=5, temperature=0)
    module = DPOModule(tiny_palm(), generation=config)
    prompts: Any = {"prompts": [[1, 2, 3], [4]], "rows": torch.tensor([7, 9])}
    (rows,) = trainer(tmp_path).predict(module, loader([prompts]))
    results: list[list[Generation]] = generate(tiny_palm(), prompts["prompts"], config)
    assert [row["row"] for row in rows] == [7, 9]
    assert [row["responses"] for row in rows] == [[result.tokens] for (result,) in results]
    (pairs,) = trainer(tmp_path).predict(module, loader([DPO_BATCH]))
    expected = slow_logprobs(tiny_palm(), DPO_BATCH["chosen"])
    assert [pair["logps_chosen"] for pair in pairs] == pytest.approx(expected[0], rel=1e-4)
    assert [pair["tokens_chosen"] for pair in pairs] == expected[1]
    assert {pair["rewards_margins"] for pair in pairs} == {0.0}
