"""One gradient per optimizer batch, by hand and for any split; schedules; throughput."""

import functools
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger

from lightning_align.dpo.module import DPOModule
from lightning_align.sft.module import SFTModule
from tests.toys import (
    largest_difference,
    split,
    state_of,
    tiny_palm,
)
from tests.training.runs import BATCHES, DPO_BATCH, METHODS, MODULES, SFT_BATCH, SGD, Gradients, fit, hand_loss, loader, trainer

# Training without validating is what most of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


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
