"""Every option of the methods takes steps in every precision, from the same first loss."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.module import CALMModule
from lightning_align.calm.spec import Augment
from lightning_align.dpo.module import DPOModule
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.lora import LoRAConfig
from lightning_align.references.update import ReferenceUpdate
from lightning_align.retro.module import RETROModule
from lightning_align.scoring.losses import LOSSES
from lightning_align.sft.module import SFTModule
from lightning_align.spin.module import SPINModule
from tests.calm.toys import SMALL, palms
from tests.models.families import build
from tests.retro.toys import SIZE, tiny_retro, tokens_and_neighbors
from tests.toys import Plain, preference_batch, split, state_of, tiny_palm, token_batch
from tests.training.runs import loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
SGD = functools.partial(torch.optim.SGD, lr=0.01)
Case = Callable[[Path], tuple[L.LightningModule, list[Any]]]
ROWS, PAIRS = token_batch([2, 1, 3, 2], [9, 8, 1, 7]), preference_batch(4)
LORA = LoRAConfig(rank=2)


def sft(*, backbone: Any = tiny_palm, **given: Any) -> Case:
    return lambda folder: (SFTModule(backbone(), optimizer=SGD, **given), split(ROWS, 2))


def packed() -> Case:
    tokens, targets = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.bool)
    documents = torch.full((2, 24), -1)
    starts = [0, 0]
    for row, length in enumerate(ROWS["mask"].sum(1).tolist()):
        place = slice(starts[row % 2], starts[row % 2] + length)
        tokens[row % 2, place], targets[row % 2, place] = ROWS["tokens"][row, :length], ROWS["targets"][row, :length]
        documents[row % 2, place] = row
        starts[row % 2] += length
    batch = {"tokens": tokens, "mask": documents >= 0, "targets": targets, "document_ids": documents, "rows": torch.arange(4)}
    return lambda folder: (SFTModule(tiny_palm(), optimizer=SGD), [batch] * 2)


def dpo(*, batch: dict[str, Any] | None = None, backbone: Any = tiny_palm, **given: Any) -> Case:
    batches = [{**part, **(batch or {})} for part in split(PAIRS, 2)]
    return lambda folder: (
        DPOModule(backbone(), optimizer=SGD, reference_cache=str(folder / "cache"), **given),
        batches,
    )


def spin(**given: Any) -> Case:
    generation = GenerationConfig(max_new_tokens=3, seed=3)
    return lambda folder: (
        SPINModule(tiny_palm(), generate="per_step", generation=generation, optimizer=SGD, **given),
        split(ROWS, 2),
    )


def calm(augment: dict[str, Any] | None = None, *, stored: bool = False, **given: Any) -> Case:
    def make(folder: Path) -> tuple[L.LightningModule, list[Any]]:
        anchor, other = palms(torch.float32)
        states = {"store_states": str(folder / "states")} if stored else {}
        augments = [Augment(other, **(augment or {"num_connections": 2}))]
        return CALMModule(anchor, augments, optimizer=SGD, **given, **states), split(ROWS, 2)

    return make


def retro(**model: Any) -> Case:
    def make(folder: Path) -> tuple[L.LightningModule, list[Any]]:
        tokens, neighbors = tokens_and_neighbors(2, 2 * SIZE + 1)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        targets = mask.clone()
        targets[:, 0] = False
        batch = {"tokens": tokens, "mask": mask, "targets": targets, "neighbors": neighbors}
        return RETROModule(tiny_retro(**model), optimizer=SGD, vary_neighbors=False), [batch] * 2

    return make


CASES: dict[str, Case] = {
    "sft": sft(),
    "sft-logits": sft(backbone=lambda: Plain(tiny_palm())),
    "sft-lora": sft(lora=LORA),
    "sft-dropout": sft(backbone=lambda: tiny_palm(ff_dropout=0.1, attn_dropout=0.1), dropout=False),
    "sft-qk-norm": sft(backbone=lambda: tiny_palm(qk_rmsnorm=True)),
    "sft-packed": packed(),
    "sft-router-loss": sft(backbone=lambda: build("mixtral").train(), router_aux_loss_coef=0.1),
    **{f"dpo-{loss}": dpo(loss=loss) for loss in LOSSES if loss != "exo_pair"},
    "dpo-exo_pair": dpo(loss="exo_pair", label_smoothing=0.01),
    "dpo-sum": dpo(loss={"sigmoid": 1.0, "ipo": 0.5}, sft_weight=0.3),
    **{f"dpo-{name}": dpo(divergence=name) for name in ("forward_kl", "js", "alpha")},
    "dpo-wpo": dpo(confidence_weighting=True),
    "dpo-wpo-logits": dpo(confidence_weighting=True, backbone=lambda: Plain(tiny_palm())),
    "dpo-ld": dpo(ld_alpha=0.3),
    "dpo-wpo-ld-weights-margins": dpo(
        confidence_weighting=True,
        ld_alpha=0.3,
        batch={"weights": torch.tensor([0.3, 1.7]), "margins": torch.tensor([0.1, 0.7])},
    ),
    "dpo-router-loss": dpo(backbone=lambda: build("mixtral").train(), router_aux_loss_coef=0.1),
    **{f"dpo-{kind}": dpo(reference=kind) for kind in ("stored", "moving")},
    **{f"dpo-lora-{kind}": dpo(reference=kind, lora=LORA) for kind in ("frozen", "stored", "moving")},
    "dpo-stored-ld": dpo(reference="stored", ld_alpha=0.3),
    **{f"spin-{kind}": spin(opponent=kind) for kind in ("iterate", "ema", "base", "mixture")},
    "spin-lora": spin(opponent="mixture", lora=LORA),
    "spin-correlation": spin(loss="correlation", sft_weight=0.3, monitor_kl=True),
    "calm": calm(connection=SMALL),
    "calm-gate-sum": calm(connection=ConnectionConfig(heads=2, dim_head=8, gate=True), combine="sum"),
    "calm-plain": calm(connection=ConnectionConfig(heads=2, norm=False, rotary=False, project=False)),
    "calm-prefix": calm({"num_connections": 2, "alignment": "prefix"}, connection=SMALL),
    "calm-all-stored": calm(connection=SMALL, loss_on="all", stored=True),
    "retro": retro(),
    "retro-frozen": retro(train_decoder=False),
}
PRECISIONS = ("bf16-mixed", "bf16-true", "16-mixed")


class Losses(Callback):
    """Keeps the first weights and the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.before = state_of(pl_module.policy)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def fit_module(case: Case, precision: str, folder: Path, *callbacks: Callback, steps: int = 2) -> L.LightningModule:
    """Train a few steps."""
    torch.manual_seed(0)
    module, batches = case(folder)
    # On a CPU the Trainer takes bf16-mixed for 16-mixed, unless it is given as a plugin.
    how = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {"precision": precision}
    trainer(folder, max_steps=steps, max_epochs=-1, callbacks=list(callbacks), **how).fit(module, loader(batches))
    return module


def fit(name: str, precision: str, folder: Path) -> tuple[L.LightningModule, list[float], dict[str, torch.Tensor]]:
    """Train two steps. Returns the module, its losses and its first weights."""
    seen = Losses()
    others = [ReferenceUpdate(alpha=0.5, every=1)] if "moving" in name else []
    module = fit_module(CASES[name], precision, folder, seen, *others)
    return module, seen.values, seen.before


@functools.cache
def single(name: str, folder: Path) -> list[float]:
    return fit(name, "32-true", folder)[1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_every_option_takes_steps_in_every_precision(
    name: str, precision: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = single(name, tmp_path_factory.getbasetemp())
    module, values, before = fit(name, precision, tmp_path)
    assert len(values) == 2 and all(map(math.isfinite, values))
    # The logits of these models are up to 10, and their hidden states have 8 bits: a log-prob is off by 0.05.
    assert values[0] == pytest.approx(expected[0], rel=0.03, abs=0.05)
    after = module.policy.state_dict()  # type: ignore[union-attr, operator]
    moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert moved, "no weight moved: the steps were skipped or their updates lost"
    dtypes = {p.dtype for p in module.policy.parameters()}  # type: ignore[union-attr]
    assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
