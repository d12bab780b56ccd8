"""Tests of DPO and SPIN on a composition: only its connections train and are saved, and references share its frozen models."""

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from lightning_align import CALM, CALMModule, DPOModule, ReferenceUpdate, SelfPlayGeneration, SPINModule, save_composition
from lightning_align.calm.spec import Augment
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.lora import LoRAConfig
from lightning_align.references.frozen import FrozenCopy, move_to
from lightning_align.references.moving import MovingCopy
from tests.calm.toys import SMALL, composed, palms
from tests.toys import gap, largest_difference, preference_batch, split, state_of, token_batch

ADAM = functools.partial(torch.optim.AdamW, lr=0.01)
BATCH = preference_batch(8)
TOKENS = BATCH["chosen"]["tokens"]
build = functools.partial(composed, torch.float32)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "default_root_dir": folder, "max_epochs": 2, "log_every_n_steps": 1, **options})


def loader() -> DataLoader[Any]:
    return DataLoader(split(BATCH, 2), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def names(path: Path) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in torch.load(path, weights_only=True)["state_dict"]}


def only_connections(state: dict[str, Any]) -> bool:
    return all("anchor" not in name and "augments" not in name for name in state)


@pytest.mark.parametrize("reference", ["frozen", "moving"])
def test_a_run_of_dpo_is_saved_without_frozen_models_and_resumed(reference: Any, tmp_path: Path) -> None:
    def begin() -> DPOModule:
        return DPOModule(build(), reference=reference, beta=0.3, optimizer=ADAM)

    def callbacks() -> list[Any]:
        return [ReferenceUpdate(alpha=0.5, every=3)] if reference == "moving" else []

    whole, first, second = begin(), begin(), begin()
    frozen = state_of(build().anchor)
    trainer(tmp_path, callbacks=callbacks()).fit(whole, loader(), loader())
    assert largest_difference(state_of(whole.policy.anchor), frozen) == 0  # type: ignore[arg-type]
    assert largest_difference(state_of(whole.policy.connections), state_of(build().connections)) > 1e-3  # type: ignore[arg-type]
    half, path = trainer(tmp_path, max_epochs=1, callbacks=callbacks()), tmp_path / "half.ckpt"
    half.fit(first, loader(), loader())
    half.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert only_connections(saved["state_dict"])
    assert saved["frozen"] == build().identity
    trainer(tmp_path, callbacks=callbacks()).fit(second, loader(), loader(), ckpt_path=path, weights_only=True)
    assert largest_difference(state_of(second), state_of(whole)) == 0

    again = DPOModule.load_from_checkpoint(path, backbone=build(), weights_only=True)
    assert largest_difference(state_of(again.policy), state_of(first.policy)) == 0
    anchor, augment = palms(torch.float32)
    nn.init.zeros_(anchor.norm.weight)
    other = CALM(anchor, Augment(augment, num_connections=2), connection=SMALL)
    with pytest.raises(ValueError, match=r"half.ckpt: the connections were trained with other weights of anchor"):
        trainer(tmp_path).fit(DPOModule(other, reference=reference), loader(), loader(), ckpt_path=path, weights_only=True)
    with pytest.raises(ValueError, match="trained with other weights of anchor"):
        DPOModule.load_from_checkpoint(path, backbone=other, weights_only=True)


@pytest.mark.parametrize("reference", ["frozen", "moving"])
def test_a_reference_copies_only_the_connections(reference: Any, tmp_path: Path) -> None:
    module = DPOModule(build(), reference=reference)
    module.configure_model()
    copied: Any = module.reference
    assert isinstance(copied, (FrozenCopy, MovingCopy))
    policy: Any = module.policy
    theirs = {p.data_ptr(): p.numel() for p in copied.model.parameters()}
    ours = {p.data_ptr(): p.numel() for p in policy.parameters()}
    trained = sum(p.numel() for p in policy.connections.parameters())
    assert sum(theirs[place] for place in theirs.keys() - ours.keys()) == trained
    assert {id(p) for p in policy.anchor.parameters()} <= {id(p) for p in copied.model.parameters()}
    begin = policy(TOKENS).detach()
    callbacks: list[Any] = [ReferenceUpdate(every=100)] if reference == "moving" else []
    trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(module, loader(), loader())
    assert gap(policy(TOKENS), begin) > 1e-6
    assert gap(copied.model(TOKENS), begin) == 0, "the reference is the composition as it began"


def test_a_moving_reference_in_16_bits_keeps_the_frozen_models(tmp_path: Path) -> None:
    module = DPOModule(composed(torch.bfloat16), reference="moving")
    module.configure_model()
    reference: Any = module.reference
    assert {p.dtype for p in reference.average.model.parameters()} == {torch.float32}
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
    reference.update(module.policy, alpha=1.0)
    assert gap(reference.model(TOKENS), module.policy(TOKENS)) == 0


def test_a_shared_model_is_moved_whole() -> None:
    # The first parameters are shared with a policy that is on the device already.
    model = nn.ModuleList([nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)])
    move_to(model, torch.device("meta"))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_policy_of_a_run_starts_from_a_folder_or_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_composition(build(), "c")
    run = trainer(tmp_path, max_epochs=1)
    first = DPOModule(init_from="c", optimizer=ADAM)
    run.fit(first, loader(), loader())
    run.save_checkpoint("dpo.ckpt")
    assert names(Path("dpo.ckpt")) == {"policy.connections"}
    again = DPOModule.load_from_checkpoint("dpo.ckpt", weights_only=True)
    assert largest_difference(state_of(again), state_of(first)) == 0
    resumed = DPOModule(init_from="c", optimizer=ADAM)
    trainer(tmp_path, max_epochs=2).fit(resumed, loader(), loader(), ckpt_path="dpo.ckpt", weights_only=True)
    calm = CALMModule(init_from="dpo.ckpt")  # aligned connections are trained on
    calm.configure_model()
    assert largest_difference(state_of(calm.policy), state_of(first.policy)) == 0
    with pytest.raises(ValueError, match="`anchor` and `augments` must be left out with `init_from`"):
        CALMModule("c/anchor", [Augment("c/augment_0")], init_from="c")
    with pytest.raises(ValueError, match="must contain a composition, but does not"):
        CALMModule(init_from="c/anchor")


def test_adapters_within_a_composition_are_not_written(tmp_path: Path) -> None:
    module = DPOModule(build(), lora=LoRAConfig(rank=2, targets=["in_proj"]))
    module.configure_model()
    with pytest.raises(ValueError, match="anchor has LoRA adapters, which the folder of a composition cannot hold"):
        save_composition(module.policy, tmp_path / "c")


@pytest.mark.parametrize("opponent", ["iterate", "ema", "base", "mixture"])
def test_self_play_keeps_only_connections(opponent: Any, tmp_path: Path) -> None:
    batch = token_batch([2, 1, 3, 2], [3, 2, 4, 3])
    rows = DataLoader(split({**batch, "rows": torch.arange(4)}, 2), batch_size=None)  # type: ignore[arg-type]

    def begin() -> tuple[SPINModule, L.Trainer]:
        settings = GenerationConfig(max_new_tokens=4, eos_token=0)
        module = SPINModule(build(), opponent=opponent, generate="per_step", generation=settings, optimizer=ADAM)
        play = SelfPlayGeneration(iterations=1, folder=str(tmp_path / "sets"))
        return module, trainer(tmp_path, max_epochs=1, callbacks=[play])

    module, run = begin()
    run.fit(module, rows, rows)
    path = tmp_path / "spin.ckpt"
    run.save_checkpoint(path)
    assert only_connections(torch.load(path, weights_only=True)["state_dict"])
    policy: Any = module.policy
    known = {p.data_ptr() for p in policy.parameters()}
    kept = [part for part in (module.opponent.base(policy), getattr(module.opponent.moving, "model", None)) if part is not None]
    assert kept
    trained = sum(p.numel() for p in policy.connections.parameters())
    for model in kept:
        assert sum(p.numel() for p in model.parameters() if p.data_ptr() not in known) == trained
    again = SPINModule.load_from_checkpoint(path, backbone=build(), weights_only=True)
    assert largest_difference(state_of(again.policy), state_of(policy)) == 0
    for file in (tmp_path / "sets").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            assert only_connections(dict.fromkeys(stored.keys()))
