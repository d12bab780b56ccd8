"""What PEFT writes is read: by `PretrainedLM(adapter=folder)` through PEFT, by `read_adapter` as plain LoRA, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align import DPOModule, LoRAConfig, PretrainedLM, SFTModule
from lightning_align.models.adapter_files import beyond_plain_lora
from lightning_align.models.formats import merged_weights, read_adapter, read_model, whole_weights, write_model
from lightning_align.scoring.sums import response_logprobs
from tests.models.families import build
from tests.models.test_pretrained import batch

peft = pytest.importorskip("peft", reason="needs the extra hf")
TOKENS = torch.tensor([[3, 90, 41, 17, 8, 60, 4, 7], [5, 6, 7, 95, 0, 1, 4, 7]])
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"]}
PLAIN: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "rsLoRA": {**LORA, "use_rslora": True, "lora_alpha": 5},
    "a regular expression": {**LORA, "target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "some layers": {**LORA, "layers_to_transform": [1]},
    "all linear layers": {**LORA, "target_modules": "all-linear"},
    "excluded layers": {**LORA, "target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "Gaussian start": {**LORA, "init_lora_weights": "gaussian"},
    "orthogonal start": {**LORA, "init_lora_weights": "orthogonal"},
}
"""Read by both, with the same logits."""
BEYOND: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({**LORA, "use_dora": True}, "use_dora"),
    "patterns of ranks": ({**LORA, "rank_pattern": {"down_proj": 2}}, "rank_pattern"),
    "patterns of alphas": ({**LORA, "alpha_pattern": {"q_proj": 32}}, "alpha_pattern"),
    "whole layers": ({**LORA, "modules_to_save": ["lm_head", "input_layernorm"]}, "modules_to_save"),
    "tokens": ({**LORA, "trainable_token_indices": [4, 7]}, "trainable_token_indices"),
    "PiSSA": ({**LORA, "init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    "OLoRA": ({**LORA, "init_lora_weights": "olora"}, "init_lora_weights: olora"),
    "own biases": ({**LORA, "lora_bias": True}, "lora_bias"),
    "embeddings": ({**LORA, "target_modules": ["embed_tokens"]}, r"contain only adapters of linear layers"),
    "IA3": ({"peft_type": "IA3", "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "is IA3"),
    "LoHa": ({"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj"]}, "is LOHA"),
    "LoKr": ({"peft_type": "LOKR", "r": 4, "target_modules": ["q_proj"]}, "is LOKR"),
    "OFT": ({"peft_type": "OFT", "r": 4, "oft_block_size": 0, "target_modules": ["q_proj"]}, "is OFT"),
}
"""Read by `PretrainedLM(adapter=folder)`. `read_adapter` refuses it and says so."""
NEITHER: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({**LORA, "bias": "all"}, "bias: all"),
    "prompts": ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "is PROMPT_TUNING"),
    "random PiSSA": ({**LORA, "init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    model = PretrainedLM(config={"model_type": "llama", "attention_bias": True, "mlp_bias": True, **sizes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.model.save_pretrained(folder)
    return str(folder)


def written(base: str, config: dict[str, Any], folder: Path) -> torch.Tensor:
    """Let PEFT write adapters that moved, and return their logits."""
    torch.manual_seed(1)
    model = peft.get_peft_model(PretrainedLM(base).model, peft.get_peft_config({"task_type": "CAUSAL_LM", **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return logits


def logits_of(model: PretrainedLM) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_lora_is_read_in_both_ways(name: str, base: str, tmp_path: Path) -> None:
    expected = written(base, PLAIN[name], tmp_path)
    model = PretrainedLM(base)
    assert read_adapter(model, tmp_path)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(PretrainedLM(base, adapter=str(tmp_path))), expected, atol=1e-4, rtol=0)
    assert float((logits_of(PretrainedLM(base)) - expected).abs().max()) > 0.01


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # advice of single types about their settings
@pytest.mark.parametrize("name", BEYOND)
def test_other_adapters_are_read_through_peft(name: str, base: str, tmp_path: Path) -> None:
    config, message = BEYOND[name]
    expected = written(base, config, tmp_path)
    with pytest.raises(ValueError, match=rf"{message}.*PEFT reads it: `PretrainedLM\(name, adapter="):
        read_adapter(PretrainedLM(base), tmp_path)
    torch.testing.assert_close(logits_of(PretrainedLM(base, adapter=str(tmp_path))), expected, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", NEITHER)
def test_what_no_reader_restores_is_right_or_refused(name: str, base: str, tmp_path: Path) -> None:
    config, message = NEITHER[name]
    expected = written(base, config, tmp_path)
    with pytest.raises(ValueError, match=message):
        read_adapter(PretrainedLM(base), tmp_path)
    try:
        model = PretrainedLM(base, adapter=str(tmp_path))
    except ValueError as error:
        assert "Pass" in str(error)
    else:
        torch.testing.assert_close(logits_of(model), expected, atol=1e-3, rtol=0)


def test_settings_of_a_later_peft_are_not_read_as_plain_lora() -> None:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "init_lora_weights": True, "use_dora": False}
    assert beyond_plain_lora(plain) == []
    assert beyond_plain_lora({**plain, "use_new_trick": True, "other_trick": None}) == ["use_new_trick"]


# -- starts from data


def test_corda_starts_from_its_cache(base: str, tmp_path: Path) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    adapter = {**LORA, "init_lora_weights": "corda", "corda_config": {"cache_file": str(tmp_path / "corda.pt")}}
    with pytest.raises(ValueError, match=r"`cache_file` that does not exist.*preprocess_corda on the base model once"):
        PretrainedLM(base, adapter=adapter)
    with pytest.raises(ValueError, match="`corda_config` names no `cache_file`"):
        PretrainedLM(base, adapter={**LORA, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}})
    model, config = PretrainedLM(base).model, peft.get_peft_config({"task_type": "CAUSAL_LM", **adapter})

    def run() -> None:
        for seed in range(8):
            model(input_ids=torch.randint(0, 96, (1, 64), generator=torch.Generator().manual_seed(seed)))

    preprocess_corda(model, config, run_model=run)
    policy = PretrainedLM(base, adapter=adapter)
    assert policy.start is not None and policy.start.on_is_base and not policy.start.off_is_base
    assert not any(hasattr(module, "eigens") for module in policy.modules())
    module = DPOModule(policy)
    module.configure_model()
    rows: Any = batch()
    plain = response_logprobs(PretrainedLM(base).eval(), rows).sums.detach()
    policy.eval()
    with torch.no_grad():
        torch.testing.assert_close(response_logprobs(policy, rows).sums, plain, atol=1e-3, rtol=0)
        torch.testing.assert_close(module.reference.logprobs(policy, rows).sums, plain, atol=1e-4, rtol=0)  # type: ignore[arg-type]
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    expected = logits_of(policy)
    write_model(policy, merged_weights(policy, whole_weights(policy)), tmp_path / "out")
    torch.testing.assert_close(logits_of(read_model(tmp_path / "out")), expected, atol=1e-3, rtol=0)  # type: ignore[arg-type]
    again = PretrainedLM(**json.loads(json.dumps(policy.init_args)))
    again.load_state_dict(policy.state_dict())
    assert torch.equal(logits_of(again), expected)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but `eva_config` is not specified")
@pytest.mark.parametrize("start", ["eva", "lora_ga"])
def test_starts_that_need_rows_are_refused(start: str, base: str) -> None:
    with pytest.raises(ValueError, match=r"computed from gradients or activations of training rows"):
        PretrainedLM(base, adapter={**LORA, "init_lora_weights": start})


# -- families


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:The following (rank|alpha)_pattern keys did not")
@pytest.mark.parametrize("family", ["mixtral", "gemma3", "falcon", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("own", [True, False])
def test_adapters_of_all_layers_are_merged(own: bool, family: str, tmp_path: Path) -> None:
    """Experts have several adapters on one module, vision towers are left out, and Falcon has its own linear layer."""
    from lightning_align.models.lora import add_lora, train_only

    build(family).model.save_pretrained(tmp_path / "base")
    if own:
        model = PretrainedLM(str(tmp_path / "base"))
        names = add_lora(model, LoRAConfig(rank=2))
        train_only(model, "default")
        assert names and not any("vision" in name for name in names)
    else:
        model = PretrainedLM(str(tmp_path / "base"), adapter={"r": 2, "target_modules": "all-linear"})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = logits_of(model)
    assert float((expected - logits_of(build(family))).abs().max()) > 1e-3
    write_model(model, merged_weights(model, whole_weights(model)), tmp_path / "out")
    torch.testing.assert_close(logits_of(read_model(tmp_path / "out")), expected, atol=1e-3, rtol=0)  # type: ignore[arg-type]


def test_a_layer_that_is_read_but_not_called_cannot_have_an_adapter() -> None:
    module = SFTModule(build("mamba"), lora=LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"dt_proj cannot have an adapter, because the model reads its weight"):
        module.configure_model()
    SFTModule(build("mamba"), lora=LoRAConfig(rank=2, targets=["in_proj", "out_proj"])).configure_model()


def test_rows_of_an_output_layer_with_a_bias_train_whole(tmp_path: Path) -> None:
    """PEFT leaves the bias out where it trains single rows."""
    build("phi").model.save_pretrained(tmp_path / "base")
    model = PretrainedLM(str(tmp_path / "base"), adapter={"r": 2, "target_modules": ["q_proj"]}, resize_embeddings=270)
    assert model.start is not None and model.start.on_is_base and model.start.off_is_base
    indices = {"embed_tokens": [261], "lm_head": [261]}
    with pytest.raises(ValueError, match="PEFT leaves out its bias"):
        PretrainedLM(
            str(tmp_path / "base"),
            adapter={"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": indices},
            resize_embeddings=270,
        )
