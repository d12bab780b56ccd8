"""What checkpoints of SFTModule and DPOModule hold, and that runs resume from them; the frozen reference."""

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_align.dpo.batch import concatenate
from lightning_align.dpo.module import DPOModule
from lightning_align.models.checkpoint import load_policy
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.weights import weights_hash
from lightning_align.scoring.sums import response_logprobs
from lightning_align.sft.module import SFTModule
from lightning_align.training.checkpoints import check_trained_count
from lightning_align.training.schedules import WarmupDecay
from tests.toys import (
    largest_difference,
    save_llama,
    split,
    state_of,
    tiny_palm,
)
from tests.training.runs import (
    ADAMW,
    BATCHES,
    DPO_BATCH,
    METHODS,
    MODULES,
    SFT_BATCH,
    SGD,
    fit,
    loader,
    trainer,
)

# Training without validating is what most of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


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
        # Rows that share their prompt are rounded otherwise than the separate ones below.
        "stored": {"reference": "stored", "reference_cache": str(tmp_path), "shared_prefix": False},
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


def test_a_lora_checkpoint_of_a_model_with_tied_embeddings_holds_only_adapters(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    save_llama(tmp_path / "model", tied=True)

    def made() -> SFTModule:
        return SFTModule(PretrainedLM(str(tmp_path / "model")), lora=LoRAConfig(rank=2), optimizer=SGD)

    module, path, batches = made(), tmp_path / "lora.ckpt", split(SFT_BATCH, 4)
    trainer(tmp_path, max_epochs=2).fit(module, loader(batches))
    module.trainer.save_checkpoint(path)
    names = list(torch.load(path, weights_only=True)["state_dict"])
    assert names and all(".lora." in name for name in names)
    for loaded in (SFTModule.load_from_checkpoint(path, weights_only=True), load_policy(path)):
        torch.testing.assert_close(loaded(SFT_BATCH["tokens"]), module(SFT_BATCH["tokens"]), rtol=0, atol=1e-6)
    again = made()
    trainer(tmp_path, max_epochs=2).fit(again, loader(batches), ckpt_path=path)  # all its steps are done
    assert largest_difference(state_of(again.policy), state_of(module.policy)) == 0


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
    with pytest.raises(ValueError, match="must be 0 for the ipo loss"):
        DPOModule(tiny_palm, loss="ipo", label_smoothing=0.1)


@pytest.mark.parametrize("groups", [[[0]], [[0, 1, 2]], [[0], [1, 2, 3]]])
def test_a_checkpoint_that_trains_another_number_of_weights_is_refused(groups: list[list[int]]) -> None:
    """A sharded strategy loads adapters and connections without strictness, so that a missing one would keep its start."""
    optimizers = [torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=0.1)]
    states = [{"state": {}, "param_groups": [{"params": group} for group in groups]}]
    with pytest.raises(ValueError, match=rf"must train 2 weights, as this run does, but trains {sum(map(len, groups))}"):
        check_trained_count({"optimizer_states": states}, optimizers, "some.ckpt")
    states[0]["param_groups"] = [{"params": [3]}, {"params": [7]}]
    for checkpoint in ({"optimizer_states": states}, {"optimizer_states": []}, {}):
        check_trained_count(checkpoint, optimizers, "some.ckpt")
