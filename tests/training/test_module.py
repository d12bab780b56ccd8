"""SFTModule and DPOModule with a bare Trainer: foreign models, what is logged, options of the Trainer."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_align.dpo.batch import concatenate
from lightning_align.dpo.module import DPOModule
from lightning_align.scoring.sums import response_logprobs
from lightning_align.sft.module import SFTModule
from tests.toys import (
    Plain,
    largest_difference,
    slow_logprobs,
    split,
    state_of,
    tiny_palm,
    token_batch,
)
from tests.training.runs import BATCHES, DPO_BATCH, METHODS, MODULES, SFT_BATCH, SGD, Gradients, fit, hand_loss, loader, trainer

# Training without validating is what most of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


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
    # One step down its own batch: by 0.02 at least here, and losses round by 1e-6.
    assert seen.metrics[1]["train/loss"] < seen.metrics[0]["train/loss"] - 0.005


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
