"""Every loss in training: with split batches, with and without a reference, and with weights and margins of rows."""

import functools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from lightning_align.data.forms import BadRowError
from lightning_align.dpo.batch import concatenate
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig
from lightning_align.scoring.losses import LOSSES, REFERENCE_FREE, SORTED
from tests.data.helpers import encode
from tests.toys import largest_difference, preference_batch, slow_logprobs, split, state_of, tiny_palm

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SGD = functools.partial(torch.optim.SGD, lr=0.01)
BATCH = preference_batch(8)


def fit(folder: Path, batches: list[Any], *, steps: int = 2, **given: Any) -> DPOModule:
    module = DPOModule(given.pop("backbone", None) or tiny_palm(), optimizer=SGD, **given)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=steps, accumulate_grad_batches=len(batches), default_root_dir=folder, **quiet
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    return module


def smoothing(loss: str) -> dict[str, float]:
    # The targets of sppo_hard are at 1 / (2 b). Its gradient grows with their distance, so beta must not be small.
    return {"exo_pair": {"label_smoothing": 0.1}, "sppo_hard": {"beta": 1.0}}.get(loss, {})


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - set(SORTED)))
def test_losses_do_not_depend_on_the_split_of_the_batch(loss: Any, tmp_path: Path) -> None:
    states = [state_of(fit(tmp_path, split(BATCH, size), loss=loss, **smoothing(loss)).policy) for size in (8, 1)]
    assert largest_difference(*states) < 1e-6
    assert largest_difference(states[0], state_of(tiny_palm())) > 1e-6


@pytest.mark.parametrize("loss", [*SORTED, {"sigmoid": 0.8, "bco_pair": 0.2}, {"simpo": 1.0, "orpo": 0.5}])
def test_sorted_and_combined_losses_train(loss: Any, tmp_path: Path) -> None:
    states = []
    for steps in (1, 2):
        torch.manual_seed(0)  # the adapters start at random values
        states.append(state_of(fit(tmp_path, [BATCH], steps=steps, loss=loss, lora=LoRAConfig(rank=2)).policy))
    assert all(bool(value.isfinite().all()) for value in states[1].values())
    assert largest_difference(*states) > 1e-6


@pytest.mark.parametrize("loss", REFERENCE_FREE)
def test_reference_free_losses_build_no_reference(loss: Any, tmp_path: Path) -> None:
    module = fit(tmp_path, [BATCH], loss=loss)
    with pytest.raises(ValueError, match=f"The loss {loss} uses no reference"):
        _ = module.reference
    assert module.sft_weight == (0.0 if loss == "simpo" else 1.0)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DPOModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.objective.weights == {loss: 1.0}


def log_ratio(model: Any, side: str, share: float, others: list[int]) -> Tensor:
    """Compute the log-probs of a side row by row. Targets beyond `others[row]` have the weight `share`."""
    rows: Any = BATCH[side]  # type: ignore[literal-required]
    values = []
    for row, shared in enumerate(others):
        logps = model(rows["tokens"][row : row + 1]).detach().double().log_softmax(-1)[0]
        places = rows["targets"][row].nonzero().flatten().tolist()
        each = [float(logps[place - 1, rows["tokens"][row, place]]) for place in places]
        values.append(sum(each[:shared]) + share * sum(each[shared:]))
    return torch.tensor(values)


def test_ld_dpo_equals_the_slow_version() -> None:
    policy, reference = tiny_palm(seed=1), tiny_palm()
    module = DPOModule(tiny_palm(), ld_alpha=0.25, sft_weight=0.5)
    module.configure_model()
    module.policy.load_state_dict(policy.state_dict())
    pair_logps, ratios = module.score(BATCH)
    counts = [BATCH[side]["targets"].sum(1).tolist() for side in ("chosen", "rejected")]  # type: ignore[literal-required]
    shared = [min(pair) for pair in zip(*counts, strict=True)]
    assert any(a != b for a, b in zip(*counts, strict=True))
    for side, found in (("chosen", ratios.chosen), ("rejected", ratios.rejected)):
        expected = log_ratio(policy, side, 0.25, shared) - log_ratio(reference, side, 0.25, shared)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)
    # The likelihood term and the logged log-probs use the whole responses.
    whole, _ = slow_logprobs(policy, BATCH["chosen"])
    torch.testing.assert_close(pair_logps.sums[:8].detach(), torch.tensor(whole), rtol=1e-4, atol=1e-4)


def test_wpo_equals_the_slow_version() -> None:
    module = DPOModule(tiny_palm(), confidence_weighting=True, beta=0.5)
    module.configure_model()
    module.policy.load_state_dict(tiny_palm(seed=1).state_dict())
    logps, ratios = module.score(BATCH)
    losses = module.pair_losses(BATCH, logps, ratios)
    both = concatenate(BATCH)
    probs = module.policy(both["tokens"]).detach().double().log_softmax(-1)
    weights = []
    for row in range(16):
        places = both["targets"][row].nonzero().flatten().tolist()
        each = [float(probs[row, p - 1, both["tokens"][row, p]] - (2 * probs[row, p - 1]).exp().sum().log()) for p in places]
        weights.append(sum(each) / len(each))
    expected = (torch.tensor(weights[:8]) + torch.tensor(weights[8:])).exp()
    torch.testing.assert_close((losses / -logsigmoid(0.5 * ratios.delta)).detach(), expected, rtol=1e-4, atol=1e-4)


def test_weights_scale_and_margins_shift(tmp_path: Path) -> None:
    module = DPOModule(tiny_palm(), beta=0.5, sft_weight=0.25)
    module.configure_model()
    weights, margins = torch.rand(8), torch.rand(8)
    logps, ratios = module.score(BATCH)
    batch: Any = {**BATCH, "weights": weights, "margins": margins}
    expected = weights * (-logsigmoid(0.5 * ratios.delta - margins) - 0.25 * logps.means[:8])
    torch.testing.assert_close(module.pair_losses(batch, logps, ratios), expected)


def test_weights_and_margins_of_rows_reach_the_batch(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i}=", "chosen": "a", "rejected": "bb", "weight": 0.5 + i, "margin": -0.25 * i} for i in range(4)
    ]
    rows[2] = {name: value for name, value in rows[2].items() if name not in ("weight", "margin")}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DPODataModule(str(path), validation=str(path), batch_size=4, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.val_dataloader()
    order = batch["chosen"]["rows"].tolist()
    assert batch["weights"].tolist() == [[0.5, 1.5, 1.0, 3.5][row] for row in order]
    assert batch["margins"].tolist() == [[0.0, -0.25, 0.0, -0.75][row] for row in order]


@pytest.mark.parametrize("number", [{"weight": -1}, {"weight": "much"}, {"margin": True}, {"margin": float("nan")}])
def test_bad_weights_and_margins_are_rejected(number: dict[str, Any]) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", **number}
    with pytest.raises((ValueError, BadRowError), match=f"in field '{next(iter(number))}', expected a number"):
        encode(row)


def test_fields_of_other_kinds_of_rows_are_ignored() -> None:
    rows, _ = encode({"prompt": "a", "response": "b", "weight": "heavy"})
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ld_alpha": 1.5}, "but got 1.5"),
        ({"loss": "aot", "confidence_weighting": True}, "no loss per pair"),
        ({"loss": "simpo", "reference": "moving"}, "simpo uses no reference"),
        ({"loss": "simpo", "loss_args": {"beta": 1.0}}, "`loss_args` must only have .*, but got beta"),
    ],
)
def test_bad_combinations_are_rejected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPOModule(tiny_palm(), **given)
