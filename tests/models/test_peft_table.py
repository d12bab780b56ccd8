"""Every adapter type that the installed PEFT can add to a model: rewards at the start, merged exports, adapters alone.

A cell is right, or is refused before training or before anything is written. No cell is silently another model.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align import DPOModule, PretrainedLM
from lightning_align.models.formats import merged_weights, read_model, whole_weights, write_adapter, write_model
from lightning_align.models.peft_adapters import check_mergeable
from lightning_align.references.frozen import AdaptersOff
from lightning_align.scoring.sums import response_logprobs
from tests.models.test_pretrained import batch

peft = pytest.importorskip("peft", reason="needs the extra hf")

LAYERS = {"target_modules": ["q_proj", "down_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 0, "r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [4, 7]},
    "WAVEFT": {"n_frequency": 20},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LORA with DoRA": {"use_dora": True},
    "LORA with rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "LORA with PiSSA": {"init_lora_weights": "pissa"},
    "LORA with OLoRA": {"init_lora_weights": "olora"},
    "LORA with orthogonal start": {"init_lora_weights": "orthogonal"},
    "LORA with Gaussian start": {"init_lora_weights": "gaussian"},
    "LORA with random start": {"init_lora_weights": False},
    "LORA with biases": {"bias": "lora_only"},
    "LORA with own biases": {"lora_bias": True},
    "LORA with whole norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "LORA with whole head": {"modules_to_save": ["lm_head"]},
    "LORA with tokens": {"trainable_token_indices": [4, 7]},
    "LORA on head and embedding": {"target_modules": ["lm_head", "embed_tokens"]},
}
TYPES = {kind.value: {"peft_type": kind.value, **LAYERS, **SETTINGS.get(kind.value, {})} for kind in peft.PeftType}
TABLE = TYPES | {name: {"peft_type": "LORA", "r": 4, **LAYERS, **options} for name, options in VARIANTS.items()}
TABLE |= {f"{name} from zero": {**TYPES[name], "init_weights": True} for name in ("C3A", "FOURIERFT")}
STARTS_ELSEWHERE = {"LORA with random start", "C3A", "FOURIERFT"}
MOVES_ITS_BASE = {"LORA with PiSSA", "LORA with OLoRA", "LORA with biases"}
CANNOT_MERGE = {"BEFT", "LORA with own biases"}
REFUSED = {
    # Prompts and prefixes are no layers, shared vectors belong to a model of PEFT, and mixtures need one, too.
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE", "SHADOW"),
    *("VERA", "FROD", "PVERA", "VBLORA", "UNILORA", "TINYLORA", "XLORA", "POLY"),
}
"""The types that are refused when the model is built."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = PretrainedLM(config={"model_type": "llama", "vocab_size": 96, "attention_bias": True, **sizes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.model.save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # advice of single types about their settings
@pytest.mark.parametrize("name", TABLE)
def test_each_type_of_adapter_is_right_or_refused(name: str, base: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    if name == "LILY":  # weights its parts by their mean over all tokens of the batch, later ones too
        with pytest.raises(ValueError, match=r"must be causal.*Use another kind of adapter"):
            PretrainedLM(base, adapter=dict(TABLE[name]))
        return
    if name in REFUSED:
        with pytest.raises(ValueError, match="PretrainedLM: `adapter` must be"):
            PretrainedLM(base, adapter=dict(TABLE[name]))
        return
    policy = PretrainedLM(base, adapter=dict(TABLE[name]))
    rows: Any = batch()
    plain = response_logprobs(PretrainedLM(base).eval(), rows).sums.detach()
    assert policy.start is not None
    assert policy.start.on_is_base == (name not in STARTS_ELSEWHERE)
    assert policy.start.off_is_base == (name not in MOVES_ITS_BASE)

    # The reference is the base model, and rewards are 0 before the first update.
    module = DPOModule(policy)
    if name in STARTS_ELSEWHERE:
        with pytest.raises(ValueError, match="The policy must start as its reference"):
            module.configure_model()
    else:
        module.configure_model()
        assert isinstance(module.reference, AdaptersOff) == policy.start.off_is_base
        policy.eval()
        with torch.no_grad():
            rewards = response_logprobs(policy, rows).sums - module.reference.logprobs(policy, rows).sums  # type: ignore[union-attr]
        assert float(rewards.abs().max()) < 1e-4

    # After an update the reference is still the base model, and the policy is not.
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    policy.train()
    for _ in range(2):  # some types begin with a gradient of 0 in one factor
        policy.zero_grad()
        (-response_logprobs(policy, rows).sums.mean()).backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign() * -0.05)
    policy.eval()
    with torch.no_grad():
        assert float((response_logprobs(policy, rows).sums - plain).abs().max()) > 1e-3
        if name not in STARTS_ELSEWHERE:
            torch.testing.assert_close(module.reference.logprobs(policy, rows).sums, plain, atol=1e-4, rtol=0)  # type: ignore[union-attr]

    # The merged export and the adapters alone compute what was trained, or are not written.
    tokens = rows["tokens"]
    expected = policy(tokens).detach()
    if name in CANNOT_MERGE:
        with pytest.raises(ValueError, match="cannot be merged into this model"):
            check_mergeable(policy)
        with pytest.raises(ValueError, match="cannot be merged into this model"):
            write_model(policy, merged_weights(policy, whole_weights(policy)), tmp_path / "merged")
    else:
        check_mergeable(policy)
        write_model(policy, merged_weights(policy, whole_weights(policy)), tmp_path / "merged")
        torch.testing.assert_close(read_model(tmp_path / "merged")(tokens), expected, atol=1e-3, rtol=0)
    if name in MOVES_ITS_BASE:
        with pytest.raises(ValueError, match="cannot be written alone"):
            write_adapter(policy, whole_weights(policy), tmp_path / "adapter")
        return
    write_adapter(policy, whole_weights(policy), tmp_path / "adapter")
    alone = PretrainedLM(base, adapter=str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(alone(tokens), expected, atol=1e-3, rtol=0)
