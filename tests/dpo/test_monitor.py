"""The preference monitor: its values against slow versions, its warnings, and the arguments it rejects."""

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule
from lightning_align.dpo.monitor import PreferenceMonitor
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.references.update import ReferenceUpdate
from lightning_align.scoring.losses import LOSSES, REFERENCE_FREE, SORTED
from lightning_align.scoring.objective import Objective
from lightning_align.scoring.ratios import Ratios
from lightning_align.sft.module import SFTModule
from lightning_align.types import PreferenceBatch
from tests.toys import preference_batch, slow_logprobs, split, tiny_palm

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

BATCH = preference_batch(8)
SGD = functools.partial(torch.optim.SGD, lr=0.05)


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def trainer(folder: Path, *callbacks: Any, **arguments: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "default_root_dir": folder, **quiet}
    return L.Trainer(**{**defaults, **arguments}, callbacks=list(callbacks))


def moved(seed: int = 1, **given: Any) -> DPOModule:
    """Make a module with a policy that differs from its reference."""
    module = DPOModule(tiny_palm(), **given)
    module.configure_model()
    module.policy.load_state_dict(tiny_palm(seed=seed).state_dict())
    return module


def validated(module: DPOModule, folder: Path, *, size: int = 8, batch: PreferenceBatch = BATCH, **given: Any) -> Any:
    (values,) = trainer(folder, PreferenceMonitor(**given)).validate(module, loader(split(batch, size)), verbose=False)
    return values


def alarms(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if str(w.message).startswith("PreferenceMonitor")]


# -- values


def ratios(chosen: list[float], rejected: list[float]) -> Ratios:
    lengths = torch.full((len(chosen),), 2)
    sides = torch.tensor(chosen), torch.tensor(rejected)
    return Ratios(*sides, lengths, lengths, sides[0] - sides[1])


@pytest.mark.parametrize(
    ("loss", "beta", "deltas", "expected"),
    [
        # s(4.5) = 0.9890 and s(4.7) = 0.9910; a wrongly ranked pair has its full gradient.
        ("sigmoid", 0.1, [0.0, 45.0, 47.0, -90.0], [False, False, True, False]),
        ("sigmoid", 1.0, [0.0, 4.5, 4.7, -9.0], [False, False, True, False]),
        # No gradient beyond b d = 1.
        ("hinge", 0.5, [0.0, 1.9, 2.1, -9.0], [False, False, True, False]),
        # The target of d / 2 is 1 / (2 b) = 1. Only there the gradient vanishes.
        ("ipo", 0.5, [0.0, 2.0, 1.9, 4.0], [False, True, False, False]),
    ],
)
def test_saturated_by_hand(loss: Any, beta: float, deltas: list[float], expected: list[bool]) -> None:
    with torch.inference_mode():
        found = Objective(loss, beta=beta).saturated(ratios([d / 2 for d in deltas], [-d / 2 for d in deltas]))
    assert found.tolist() == expected


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - set(REFERENCE_FREE)))
def test_no_loss_is_saturated_at_the_start(loss: Any) -> None:
    objective = Objective(loss, beta=0.1, label_smoothing=0.01 if loss == "exo_pair" else 0)
    start = ratios([0.0, 0.0], [0.0, 0.0])
    assert not objective.saturated(start).any()
    if loss not in SORTED:
        assert not objective.saturated(ratios([-1.0, 0.0], [1.0, 0.0])).any()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_margins_that_are_no_numbers_are_counted(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diverged policy ends no validation, whether all margins are NaN or some."""
    module = moved(beta=2.0)
    score = module.score

    def diverged(batch: Any) -> Any:
        policy, ratios = score(batch)
        ratios.chosen[: round(share * len(ratios.chosen))] = float("nan")
        return policy, ratios

    monkeypatch.setattr(module, "score", diverged)
    with pytest.warns(UserWarning, match=rf"{round(share * 8)} of 8 pairs of the validation have margins that are not finite"):
        values = validated(module, tmp_path, size=8)
    assert values["val/rewards/margins"] != values["val/rewards/margins"]


@pytest.mark.parametrize("size", [8, 3, 1])
def test_validation_equals_the_slow_version(size: int, tmp_path: Path) -> None:
    module = moved(beta=2.0)
    values = validated(module, tmp_path, size=size)
    sides = {}
    for side in ("chosen", "rejected"):
        policy, counts = slow_logprobs(module.policy, BATCH[side])  # type: ignore[literal-required]
        reference, _ = slow_logprobs(tiny_palm(), BATCH[side])  # type: ignore[literal-required]
        sides[side] = torch.tensor(policy) - torch.tensor(reference), torch.tensor(counts)
    (chosen, long), (rejected, short) = sides["chosen"], sides["rejected"]
    assert values["val/logps/chosen_displacement"] == pytest.approx(float(chosen.sum() / long.sum()), rel=1e-4)
    margins, more = chosen - rejected, (long - short).float()
    expected = torch.corrcoef(torch.stack([margins, more]))[0, 1]
    assert values["val/rewards/length_correlation"] == pytest.approx(float(expected), abs=1e-4)
    share = float((torch.sigmoid(2 * margins) > 0.99).float().mean())
    assert 0 < share < 1
    assert values["val/rewards/saturated"] == share


def test_training_values_are_per_window(tmp_path: Path) -> None:
    """Two windows of two steps with two pairs each. The policy is constant, so the value of a window is that of its pairs."""

    class Values(L.Callback):
        found: list[float]

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.found.append(float(trainer.logged_metrics.get("train/logps/chosen_displacement", torch.nan)))

    values = Values()
    values.found = []
    module = moved(optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check of the first batch warns that the policy differs from the reference
        trainer(tmp_path, PreferenceMonitor(), values, log_every_n_steps=2).fit(module, loader(split(BATCH, 2)))
    expected = []
    for half in split(BATCH, 4):
        policy, counts = slow_logprobs(module.policy, half["chosen"])
        reference, _ = slow_logprobs(tiny_palm(), half["chosen"])
        expected.append((sum(policy) - sum(reference)) / sum(counts))
    # Callbacks later in the list see the value at the end of its step.
    assert module.trainer.logged_metrics["train/logps/chosen_displacement"] == pytest.approx(expected[1], rel=1e-4)
    assert values.found[2] == pytest.approx(expected[0], rel=1e-4)


def test_without_a_fixed_reference_displacement_is_from_the_first_value(tmp_path: Path) -> None:
    for given in ({"loss": "cpo"}, {"reference": "moving"}):
        monitor = PreferenceMonitor()
        module = DPOModule(tiny_palm(), optimizer=SGD, **given)  # type: ignore[arg-type]
        callbacks = [ReferenceUpdate(alpha=1.0, every=1)] if "reference" in given else []
        fit = trainer(tmp_path, monitor, *callbacks, max_epochs=2, num_sanity_val_steps=0)
        fit.validate(module, loader([BATCH]), verbose=False)
        first = float(torch.tensor(slow_logprobs(module.policy, BATCH["chosen"])[0]).sum())
        fit.fit(module, loader([BATCH]), loader([BATCH]))
        last, counts = slow_logprobs(module.policy, BATCH["chosen"])
        value = fit.callback_metrics["val/logps/chosen_displacement"]
        assert value == pytest.approx((sum(last) - first) / sum(counts), rel=1e-3, abs=1e-6)
        assert ("val/rewards/saturated" in fit.callback_metrics) == ("reference" in given)
        again = PreferenceMonitor()
        again.load_state_dict(monitor.state_dict())
        assert again.start == monitor.start and set(again.start) == {"train", "val"}


# -- the KL


def test_kl_equals_the_slow_version_on_the_samples(tmp_path: Path) -> None:
    module = moved()
    values = [validated(module, tmp_path, size=size, num_prompts=5, max_new_tokens=6)["val/kl/reference"] for size in (8, 3, 1)]
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] == pytest.approx(values[2], rel=1e-5)
    prompts = []
    for tokens, targets in zip(BATCH["chosen"]["tokens"][:5], BATCH["chosen"]["targets"][:5], strict=True):
        prompts.append(tokens[: int(targets.int().argmax())].tolist())
    texts = [answer.tokens for (answer,) in generate(module.policy, prompts, GenerationConfig(max_new_tokens=6))]
    rows = [torch.tensor(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    total = 0.0
    for row, prompt in zip(rows, prompts, strict=True):
        places = torch.arange(len(row))
        side: Any = {"tokens": row[None], "mask": (places >= 0)[None], "targets": (places >= len(prompt))[None]}
        total += slow_logprobs(module.policy, side)[0][0] - slow_logprobs(tiny_palm(), side)[0][0]
    assert values[0] == pytest.approx(total / 30, rel=1e-4)


def test_kl_estimate_is_close_to_the_exact_kl(tmp_path: Path) -> None:
    """One token after one prompt, 2000 times: within four standard errors of the sum over the vocabulary."""
    module, rows = moved(seed=3), 2000
    side = {"tokens": torch.tensor([[1, 2]] * rows), "mask": torch.ones(rows, 2, dtype=torch.bool)}
    side["targets"] = torch.tensor([[False, True]] * rows)
    batch: Any = {"chosen": side, "rejected": side}
    value = validated(module, tmp_path, batch=batch, size=rows, num_prompts=rows, max_new_tokens=1)["val/kl/reference"]
    with torch.no_grad():
        p, q = (model(torch.tensor([[1]]))[0, 0].double().log_softmax(0) for model in (module.policy, tiny_palm()))
    exact = float((p.exp() * (p - q)).sum())
    error = float((p.exp() * (p - q - exact) ** 2).sum()) ** 0.5 / rows**0.5
    assert exact > 0.1 and abs(value - exact) < 4 * error


def test_kl_of_the_reference_to_itself_is_zero(tmp_path: Path) -> None:
    assert validated(DPOModule(tiny_palm()), tmp_path, num_prompts=4)["val/kl/reference"] == 0


# -- warnings


def test_warnings_are_given_once_and_name_a_remedy(tmp_path: Path) -> None:
    limits = {"max_fall": 0.01, "max_length_correlation": 0.01, "max_saturated": 0.01, "max_kl": 0.01}
    module, monitor = moved(beta=2.0), PreferenceMonitor(**limits, num_prompts=4, max_new_tokens=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, monitor)
        first = run.validate(module, loader([BATCH]), verbose=False)[0]
        run.validate(module, loader([BATCH]), verbose=False)
    found = alarms(caught)
    assert len(found) == 4
    for name, limit, remedy in (
        ("logps/chosen_displacement", "-0.01", "sft_weight"),
        ("rewards/length_correlation", "-0.01", "lengths"),  # it is negative here
        ("rewards/saturated", "0.01", "add new pairs"),
        ("kl/reference", "0.01", "higher `beta`"),
    ):
        (text,) = [text for text in found if f"val/{name} is" in text]
        assert f"is {first[f'val/{name}']:.3g}, beyond its limit of {limit}, at step 0" in text and remedy in text


def biased(pairs: int, more: int) -> PreferenceBatch:
    """Make pairs with chosen longer than rejected by 0 to `more` tokens. All tokens are the same."""
    sides = {}
    for name, extra in (("chosen", True), ("rejected", False)):
        lengths = torch.tensor([4 + (row % (more + 1)) * extra for row in range(pairs)])
        places = torch.arange(6 + more)
        mask = places < 2 + lengths[:, None]
        targets = mask & (places >= 2)
        sides[name] = {"tokens": torch.full(mask.shape, 5) * mask, "mask": mask, "targets": targets}
    return sides  # type: ignore[return-value]


@pytest.mark.parametrize(("more", "alarmed"), [(5, True), (0, False)])
def test_a_planted_length_bias_is_found(more: int, alarmed: bool, tmp_path: Path) -> None:
    """If longer is always better, the policy learns to prefer length. With equal lengths there is no warning."""
    batch = biased(12, more)
    if not more:
        batch["chosen"]["tokens"] = batch["chosen"]["tokens"] * 2
    module = DPOModule(tiny_palm(), optimizer=functools.partial(torch.optim.Adam, lr=1e-3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, PreferenceMonitor(max_length_correlation=0.9), max_epochs=10, num_sanity_val_steps=0)
        run.fit(module, loader([batch]), loader([batch]))
    texts = alarms(caught)
    assert bool(texts) == alarmed, texts
    if alarmed:
        assert run.callback_metrics["val/rewards/length_correlation"] > 0.9
    else:
        assert "val/rewards/length_correlation" not in run.callback_metrics


def test_the_warning_comes_before_chosen_falls_by_a_nat(tmp_path: Path) -> None:
    """Training on flipped pairs makes the chosen responses of validation less likely."""
    batch = preference_batch(8, seed=4)
    module = DPOModule(tiny_palm(), beta=0.1, optimizer=functools.partial(torch.optim.SGD, lr=0.3))
    seen: list[float] = []

    class Fall(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(float(trainer.callback_metrics["val/logps/chosen_displacement"]))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flipped: Any = {"chosen": batch["rejected"], "rejected": batch["chosen"]}
        run = trainer(tmp_path, PreferenceMonitor(max_fall=0.2), Fall(), max_epochs=15, num_sanity_val_steps=0)
        run.fit(module, loader([flipped]), loader([batch]))
    (text,) = alarms(caught)
    step = int(text.partition("at step ")[2].partition(".")[0])
    assert all(value > -1 for value in seen[:step]) and min(seen) < -0.2


def test_no_warning_without_limits_or_within_them(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validated(moved(beta=2.0), tmp_path, num_prompts=2)
        validated(
            moved(beta=2.0), tmp_path, num_prompts=2, max_fall=99, max_length_correlation=0.9, max_saturated=0.99, max_kl=99
        )
    assert not alarms(caught)


# -- errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_fall": 0}, "`max_fall` must be above 0, but got 0"),
        ({"max_length_correlation": 1.5}, "`max_length_correlation` must be above 0 and below 1, but got 1.5"),
        ({"max_saturated": 1}, "`max_saturated` must be above 0 and below 1, but got 1"),
        ({"num_prompts": -1}, "`num_prompts` must be 0 or more, but got -1"),
        ({"max_kl": 0.1}, "`max_kl` must be None if `num_prompts` is 0, but got 0.1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` of GenerationConfig must be at least 1, but got 0"),
    ],
)
def test_arguments_out_of_range_are_rejected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceMonitor(**given)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda folder: SFTModule(tiny_palm()), "needs a DPOModule, but got SFTModule"),
        (lambda folder: DPOModule(tiny_palm(), loss="cpo"), "must be 0 with a loss without a reference, but got 2"),
        (
            lambda folder: DPOModule(tiny_palm(), reference="stored", reference_cache=str(folder)),
            "must be 0 with a stored reference, which cannot score new texts, but got 2",
        ),
    ],
)
def test_unsupported_modules_are_rejected(module: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, PreferenceMonitor(num_prompts=2)).validate(module(tmp_path), loader([BATCH]), verbose=False)
