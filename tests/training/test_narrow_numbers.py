"""What a 16-bit precision must not round: numbers of batches, stored log-probs, weights of targets, gates, routers."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_align.calm.connections import ConnectionConfig
from lightning_align.dpo.module import DPOModule
from lightning_align.models.routers import RouterRecord, Routers
from lightning_align.references.stored import StoredLogProbs
from lightning_align.scoring.ratios import tail_weights
from lightning_align.types import LogProbs, PreferenceBatch
from tests.spin.runs import finish
from tests.toys import preference_batch, tiny_palm, token_batch
from tests.training.runs import loader, trainer
from tests.training.test_precision import calm, fit_module

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Batches(Callback):
    """Keeps the training batches."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)


@pytest.mark.filterwarnings("ignore:the first batch, where the policy")  # these log-probs are of no model
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_numbers_of_batches_keep_their_dtype(precision: Any, tmp_path: Path) -> None:
    """A sum of log-probs of -123.4 would become -123.5 or -123."""
    sums, margins = torch.full((8,), -123.4), torch.full((4,), 0.3)
    reference = LogProbs(sums, torch.ones(8, dtype=torch.long))
    batch: PreferenceBatch = {**preference_batch(4), "margins": margins, "reference": reference}  # type: ignore[typeddict-item]
    seen = Batches()
    trainer(tmp_path, precision=precision, callbacks=[seen]).fit(DPOModule(tiny_palm()), loader([batch]))
    (kept,) = seen.seen
    assert torch.equal(kept["margins"], margins) and torch.equal(kept["reference"].sums, sums)


def test_a_16_bit_default_dtype_does_not_reach_log_probs_and_weights(tmp_path: Path) -> None:
    """The Trainer sets it within a step of bf16-true."""
    batch, before = token_batch([2, 2], [3, 4]), torch.get_default_dtype()
    sums = torch.tensor([-123.4, -77.7])
    torch.set_default_dtype(torch.bfloat16)
    try:
        store = StoredLogProbs(
            lambda policy, rows: LogProbs(sums, torch.tensor([3, 4])), weights="w", precision="bf16-true", cache_dir=tmp_path
        )
        store.fill([batch], tiny_palm(), torch.device("cpu"))
        store.finish()
        for again in (store, StoredLogProbs(None, weights="w", precision="bf16-true", cache_dir=tmp_path)):  # type: ignore[arg-type]
            assert torch.equal(again.logprobs(tiny_palm(), batch).sums, sums)
        weights = tail_weights(batch["targets"], 0.3)
        assert weights.dtype is torch.float32
        assert set(weights.unique().tolist()) <= {1.0, float(torch.tensor(0.3, dtype=torch.float32))}
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_open_gates_move(precision: str, tmp_path: Path) -> None:
    """Their sigmoid is 1 in 16 bits, so a derivative that is computed from it would be 0."""
    case = calm(connection=ConnectionConfig(heads=2, dim_head=8, gate=True))
    gates: list[Tensor] = []

    class Gates(Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            parameters = [connection.gate.bias for connection in pl_module.policy.connections]
            found = [pl_module.masters.of.get(p, p).grad for p in parameters]
            gates.extend(g.detach().float().clone() for g in found)

    fit_module(case, precision, tmp_path, Gates(), steps=3)
    # The output projection starts at 0, so gates have no gradient in the first step.
    assert all(bool((g != 0).all()) for g in gates[2:])


def test_the_loss_of_routers_is_in_float32() -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def function(layers: tuple[Tensor, ...], experts: int, top_k: int) -> Tensor:
        seen.extend((layer.dtype, torch.is_autocast_enabled("cpu")) for layer in layers)
        return layers[0].sum()

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        record = RouterRecord(Routers(function, 4, 2, None, True))
        record.add((torch.ones(3, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)), None)
        with torch.autocast("cpu", torch.bfloat16):
            record.loss()
    assert [dtype for dtype, _ in seen] == [torch.float32] * 4 + [torch.float64] * 2
    assert not any(on for _, on in seen)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_self_play_by_iterations(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The opponent of an iteration starts equal to the policy, although its log-probs are stored."""
    real, seen = L.Trainer, Batches()
    rewards: list[float] = []

    class Rewards(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rewards.append(float(trainer.callback_metrics["train/rewards/real"]))

    monkeypatch.setattr(L, "Trainer", lambda **given: real(**{**given, "precision": precision, "log_every_n_steps": 1}))
    finish(tmp_path, seen, Rewards(), loop={"iterations": 2, "epochs": 1})
    opponents = [batch["opponent"] for batch in seen.seen if "opponent" in batch]
    assert opponents and all(sums.dtype is torch.float32 for sums in opponents)
    assert any(bool((sums != sums.bfloat16().float()).any()) for sums in opponents)
    # Rows are padded to other widths in another batch, which rounds otherwise: 0.05 nats of a dozen tokens, times beta.
    assert abs(rewards[0]) < 0.1
