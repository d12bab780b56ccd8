"""The load-balancing loss of expert routers in SFT, DPO and SPIN."""

import functools
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.scoring.sums import response_logprobs
from lightning_align.sft.module import SFTModule
from lightning_align.spin.module import SPINModule
from tests.models.families import build
from tests.toys import preference_batch, split, tiny_palm, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-play writes its sets to the working directory by default."""
    monkeypatch.chdir(tmp_path)


SGD = functools.partial(torch.optim.SGD, lr=1.0)
SFT_BATCH = token_batch([2, 1, 3, 2], [5, 4, 1, 6])
PAIRS = preference_batch(4)


def mixtral(**config: Any) -> PretrainedLM:
    model = build("mixtral").train()
    for name, value in config.items():
        setattr(model.config, name, value)
    assert model.routers is not None
    model.routers.requested = bool(config.get("output_router_logits"))
    return model


def fit(module: Any, batches: list[Any], **arguments: Any) -> dict[str, float]:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "max_steps": 1, "enable_checkpointing": False, "log_every_n_steps": 1}
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    trainer = L.Trainer(**quiet, **arguments)
    trainer.fit(module, loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def balance(model: PretrainedLM, batch: Any) -> torch.Tensor:
    """Return the loss of transformers' own forward pass with a mask."""
    out = model.model(input_ids=batch["tokens"], attention_mask=batch["mask"].long(), output_router_logits=True)
    loss: torch.Tensor = out.aux_loss
    return loss


@pytest.mark.parametrize("size", [4, 1])
def test_the_gradient_is_that_of_the_mean_over_micro_batches(size: int) -> None:
    """By hand: sum over micro-batches of (negative log-prob + c * count * balance), divided by all tokens."""
    coefficient, parts = 3.0, split(SFT_BATCH, size)
    expected = mixtral()
    count = SFT_BATCH["targets"].sum()
    total = sum(
        -response_logprobs(expected, part).sums.sum() + coefficient * part["targets"].sum() * balance(expected, part)
        for part in parts
    )
    (total / count).backward()  # type: ignore[union-attr]
    model = mixtral()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(SFTModule(model, router_aux_loss_coef=coefficient, optimizer=SGD), parts, accumulate_grad_batches=len(parts))
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        step = (start[name] - parameter).detach()
        assert other.grad is not None
        assert float((step - other.grad).abs().max()) < 1e-4 * float(other.grad.abs().max() + 1e-2), name


def test_sft_logs_the_whole_loss_and_the_part() -> None:
    plain = fit(SFTModule(mixtral(), optimizer=SGD), [SFT_BATCH])
    assert "train/aux_loss" not in plain
    with_loss = fit(SFTModule(mixtral(), router_aux_loss_coef=0.5, optimizer=SGD), [SFT_BATCH])
    assert with_loss["train/aux_loss"] == pytest.approx(float(balance(mixtral(), SFT_BATCH).detach()), rel=1e-4)
    assert with_loss["train/loss"] == pytest.approx(plain["train/loss"] + 0.5 * with_loss["train/aux_loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "lora", "spin"])
def test_pairs_include_it_and_the_reference_does_not(method: str) -> None:
    """The first loss is log 2 plus the balance over the rows of both sides, once."""
    from lightning_align.models.lora import LoRAConfig

    both = DPOModule(mixtral()).join(PAIRS)
    if method == "spin":
        with torch.no_grad():
            opponent = response_logprobs(mixtral().eval(), both).sums
        values = fit(SPINModule(mixtral(), router_aux_loss_coef=2.0, optimizer=SGD), [{"pairs": both, "opponent": opponent}])
    else:
        lora = LoRAConfig(rank=2) if method == "lora" else None
        values = fit(DPOModule(mixtral(), lora=lora, router_aux_loss_coef=2.0, optimizer=SGD), [PAIRS])
    expected = float(balance(mixtral(), both).detach())
    assert values["train/aux_loss"] == pytest.approx(expected, rel=1e-4)
    assert values["train/loss"] == pytest.approx(math.log(2) + 2 * expected, rel=1e-4)


def test_the_configuration_decides_by_default(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")

    def said(module: Any) -> str:
        caplog.clear()
        fit(module, [SFT_BATCH])
        texts = [record.getMessage() for record in caplog.records if "router" in record.getMessage()]
        assert len(texts) <= 1, "said once"
        return "".join(texts)

    asked = mixtral(output_router_logits=True)
    assert "The loss includes 0.001 times the load-balancing loss" in said(SFTModule(asked, optimizer=SGD))
    left_out = said(SFTModule(mixtral(), optimizer=SGD))
    assert "MixtralForCausalLM has expert routers. Their load-balancing loss is not part of the loss." in left_out
    assert said(SFTModule(asked, router_aux_loss_coef=0.0, optimizer=SGD)) == ""
    assert said(SFTModule(tiny_palm(), optimizer=SGD)) == ""
    assert "transformers has no loss for them" in said(SFTModule(build("deepseek_v3").train(), optimizer=SGD))


def test_a_coefficient_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="`router_aux_loss_coef` must be 0 or more, but got -1"):
        SFTModule(tiny_palm(), router_aux_loss_coef=-1.0)
    with pytest.raises(ValueError, match="the PaLM has no expert routers"):
        SFTModule(tiny_palm(), router_aux_loss_coef=0.1).configure_model()
    with pytest.raises(ValueError, match="has expert routers, but transformers has no loss for them"):
        SFTModule(build("deepseek_v3"), router_aux_loss_coef=0.1).configure_model()
