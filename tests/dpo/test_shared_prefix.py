"""DPO and self-play with shared beginnings: the losses and gradients of separate rows, for every kind of reference."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.shared_rows import plan_prefixes
from lightning_align.scoring.losses import LOSSES
from lightning_align.spin.module import SPINModule
from lightning_align.types import PreferenceBatch
from tests.scoring.test_shared_prefix import GROUPS, group
from tests.toys import Plain, gap, preference_batch, tiny_palm


def module(backbone: Any = None, **options: Any) -> DPOModule:
    torch.manual_seed(0)  # of new adapters
    made = DPOModule(tiny_palm(dtype=torch.float64) if backbone is None else backbone, **options)
    made.configure_model()
    with torch.no_grad():  # the policy has moved away from its reference
        for number, parameter in enumerate(made.policy.parameters()):
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(number)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return made


def losses_and_gradients(made: DPOModule, batch: PreferenceBatch) -> list[Tensor]:
    policy, ratios = made.score(batch)
    losses = made.pair_losses(batch, policy, ratios)
    weights = torch.linspace(1.0, 2.0, len(losses), dtype=losses.dtype)
    trained = [parameter for parameter in made.policy.parameters() if parameter.requires_grad]
    return [losses.detach(), policy.sums.detach(), *torch.autograd.grad((losses * weights).sum(), trained)]


SETTINGS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "moving": {"reference": "moving"},
    "adapters": {"lora": LoRAConfig(rank=2, alpha=4)},
    "WPO and LD-DPO": {"confidence_weighting": True, "ld_alpha": 0.5},
    "a divergence": {"divergence": "js"},
    "an SFT term": {"sft_weight": 0.3},
}
BATCH = preference_batch(6)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_those_of_separate_rows(name: str) -> None:
    options = SETTINGS[name]
    expected = losses_and_gradients(module(shared_prefix=False, **options), BATCH)
    shared = module(**options)
    assert shared.join(BATCH)["prefixes"].saved > 0.1
    assert "prefixes" not in module(shared_prefix=False, **options).join(BATCH)
    for one, other in zip(expected, losses_and_gradients(shared, BATCH), strict=True):
        assert gap(one, other) <= 1e-12 * max(1.0, float(one.abs().max()))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in ("aot", "aot_unpaired")])
def test_every_loss_has_the_values_of_separate_rows(loss: Any) -> None:
    options: dict[str, Any] = {"loss": loss, "beta": 2.0 if loss == "simpo" else 0.1}
    if loss == "exo_pair":
        options["label_smoothing"] = 0.1
    apart, shared = module(shared_prefix=False, **options), module(**options)
    with torch.no_grad():
        expected, found = (made.pair_losses(BATCH, *made.score(BATCH)) for made in (apart, shared))
    assert gap(expected, found) <= 1e-11 * max(1.0, float(expected.abs().max()))


def test_the_plan_is_made_before_a_batch_is_sent_to_a_device() -> None:
    made = module()
    sent = made.on_before_batch_transfer(BATCH, 0)
    assert sent["prefixes"].total == plan_prefixes(made.join(BATCH)).total
    assert made.join(sent)["prefixes"] is sent["prefixes"]
    assert module(shared_prefix=False).on_before_batch_transfer(BATCH, 0)["prefixes"] is None
    assert made.on_before_batch_transfer({"prompts": [[1]]}, 0) == {"prompts": [[1]]}


def test_dropout_is_drawn_for_each_row() -> None:
    assert "prefixes" not in module(dropout=True).join(BATCH)
    assert "prefixes" in module(dropout=True, shared_prefix=True).join(BATCH)


def test_a_model_that_must_share_and_cannot_is_an_error() -> None:
    made = module(Plain(tiny_palm()), shared_prefix=True)
    with pytest.raises(ValueError, match="`shared_prefix` is true, but PaLM must compute each row apart"):
        made.score(BATCH)
    module(Plain(tiny_palm())).score(BATCH)
    with pytest.raises(ValueError, match="`shared_prefix` must be 'auto', true or false, but got 'always'"):
        DPOModule(tiny_palm(), shared_prefix="always")  # type: ignore[arg-type]


class Batches(torch.utils.data.Dataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def trained(tmp_path: Path, made: Any, batches: list[Any], **options: Any) -> dict[str, Tensor]:
    loader: Any = torch.utils.data.DataLoader(Batches(batches), batch_size=None)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **quiet, **options
    )
    trainer.fit(made, loader)
    return {name: value.detach() for name, value in made.policy.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*have no `val_dataloader`")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_ends_with_the_weights_of_separate_rows(tmp_path: Path, precision: Any) -> None:
    batches = [preference_batch(4, seed=seed) for seed in range(3)]
    ends = []
    for setting in (False, True):
        made = DPOModule(
            tiny_palm(),
            shared_prefix=setting,
            reference="stored",
            reference_cache=str(tmp_path / str(setting)),
            optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-2),
        )
        ends.append(trained(tmp_path, made, batches, precision=precision))
    limit = 1e-5 if precision == "32-true" else 2e-2
    assert max(gap(ends[0][name], ends[1][name]) for name in ends[0]) <= limit


def test_self_play_has_the_losses_of_separate_rows() -> None:
    pairs = GROUPS["pairs"]
    opponent = torch.linspace(-9.0, -3.0, len(pairs["tokens"]), dtype=torch.float64)
    found = []
    for setting in (False, True):
        made = SPINModule(tiny_palm(dtype=torch.float64), shared_prefix=setting)
        made.configure_model()
        batch = made.on_before_batch_transfer({"pairs": pairs, "opponent": opponent}, 0)
        assert ("prefixes" in batch["pairs"]) == setting
        policy, ratios, _ = made.score(batch)
        losses = made.pair_losses(policy, ratios)
        found.append([losses.detach(), *torch.autograd.grad(losses.sum(), list(made.policy.parameters()))])
    for one, other in zip(*found, strict=True):
        assert gap(one, other) <= 1e-12 * max(1.0, float(one.abs().max()))


def test_a_row_without_its_partner_is_scored_alone() -> None:
    """A last batch of one pair, and a pair whose rows have nothing in common."""
    one = group(([4, 5, 6], [7, 8]))
    two = group(([9, 3], [1, 2, 2]))
    batch: PreferenceBatch = {"chosen": one, "rejected": two}
    expected = losses_and_gradients(module(shared_prefix=False), batch)
    for value, other in zip(expected, losses_and_gradients(module(shared_prefix=True), batch), strict=True):
        assert gap(value, other) <= 1e-12 * max(1.0, float(value.abs().max()))
