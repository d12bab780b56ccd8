"""Tests of models that are built without their weights: the values are those of an ordinary build, bit for bit."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.models.composed import copy_policy
from lightning_align.models.deferred import build_deferred, is_deferred, recipe_of
from lightning_align.models.lora import LoRAConfig, add_lora
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.weights import load_weights, weights_hash
from lightning_align.retro.model import RETRO

SIZES: dict[str, Any] = {"num_tokens": 64, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "model_type": "llama"},
    "tied": {**SMALL, "model_type": "llama", "tie_word_embeddings": True},
    "gemma2": {**SMALL, "model_type": "gemma2", "head_dim": 16},
    "mixtral": {**SMALL, "model_type": "mixtral", "num_local_experts": 4},
    "gpt2": {**GPT2, "eos_token_id": None},
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "palm": lambda: PaLM(**SIZES),
    "paper": lambda: PaLM(**SIZES, variant="paper", tie_embeddings=False, qk_rmsnorm=True),
    "retro": lambda: RETRO(PaLM(**SIZES), chunk_size=4),
    **{name: lambda config=config: PretrainedLM(config=dict(config)) for name, config in CONFIGS.items()},  # type: ignore[misc]
}


def value(weight: Tensor) -> Tensor:
    recipe = recipe_of(weight)
    return weight if recipe is None else recipe.whole().to(weight.dtype)


def assert_equal(deferred: nn.Module, built: nn.Module) -> None:
    """All weights and buffers, and how weights are shared."""
    found, expected = deferred.state_dict(keep_vars=True), built.state_dict(keep_vars=True)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype is weight.dtype and torch.equal(value(found[name]), weight), name
    buffers = dict(built.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in deferred.named_buffers())
    assert len(list(deferred.parameters())) == len(list(built.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_random_weights_are_those_of_an_ordinary_build(name: str) -> None:
    """So is the random number generator after it, and a second build of the same recipes."""
    torch.manual_seed(3)
    built, after = MODELS[name](), torch.get_rng_state()
    torch.manual_seed(3)
    deferred = build_deferred(MODELS[name])
    assert torch.equal(torch.get_rng_state(), after)
    assert sum(weight.is_meta for weight in deferred.parameters()) >= 7
    for _ in range(2):
        assert_equal(deferred, built)
    assert torch.equal(torch.get_rng_state(), after), "making the values draws nothing"
    assert weights_hash(deferred) == weights_hash(built)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("stored", "wanted"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "auto")])
def test_folders_are_read_in_parts(
    name: str, stored: str, wanted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    model = PretrainedLM(config=dict(CONFIGS[name])).model.to(getattr(torch, stored))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    built = PretrainedLM(str(tmp_path), dtype=wanted)
    caplog.set_level(logging.INFO)
    deferred = build_deferred(lambda: PretrainedLM(str(tmp_path), dtype=wanted))
    assert isinstance(deferred, PretrainedLM)
    assert_equal(deferred, built)
    assert deferred.init_args == built.init_args and deferred.eos_ids == built.eos_ids
    if name == "mixtral":  # its experts have other names in files
        assert not is_deferred(deferred) and "Every rank builds the whole model" in caplog.text
        return
    assert is_deferred(deferred)
    weight = deferred.blocks[1].get_parameter("mlp.c_fc.weight" if name == "gpt2" else "mlp.up_proj.weight")
    recipe, whole = recipe_of(weight), value(weight)
    assert recipe is not None
    assert torch.equal(recipe.read((slice(5, 9), slice(0, 7))).to(whole.dtype), whole[5:9, :7])


def test_copies_conversions_and_adapters_keep_the_recipes() -> None:
    torch.manual_seed(3)
    built = PaLM(**SIZES)
    torch.manual_seed(3)
    deferred = build_deferred(lambda: PaLM(**SIZES))
    assert_equal(copy_policy(deferred, share=False), built)
    for model in (built, deferred):
        torch.manual_seed(4)
        add_lora(model, LoRAConfig(rank=2))
    assert_equal(deferred, built)


def test_checkpoints_are_loaded_later() -> None:
    torch.manual_seed(5)
    state = PaLM(**SIZES).state_dict()

    def build() -> nn.Module:
        model = PaLM(**SIZES)
        load_weights(model, state, "here")
        return model

    deferred = build_deferred(build)
    assert is_deferred(deferred)
    assert all(torch.equal(value(weight), state[name]) for name, weight in deferred.state_dict(keep_vars=True).items())


def test_builds_that_read_weights_are_ordinary(caplog: pytest.LogCaptureFixture) -> None:
    """With the same random numbers."""

    def build() -> nn.Module:
        layer = nn.Linear(32, 32)
        with torch.no_grad():
            layer.weight.div_(layer.weight.norm())
        return layer

    torch.manual_seed(3)
    built = build()
    caplog.set_level(logging.INFO)
    torch.manual_seed(3)
    again = build_deferred(build)
    assert not is_deferred(again) and "the build reads its weights" in caplog.text
    assert_equal(again, copy.deepcopy(built))
