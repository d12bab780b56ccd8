"""The optional capabilities of a PretrainedLM give the same results as the model of transformers, for each family."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.formats import read_model, whole_weights, write_model
from lightning_align.models.head_probe import probe_head
from lightning_align.models.language_model import has_cache, has_hidden
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.runtime import hub
from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.scoring.sums import response_logprobs
from tests.toys import largest_difference

V = 96
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# Covers sliding windows shorter than the rows below, tied and untied heads, biases and their absence, one or more key heads.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2},
    "qwen3": {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6},
    "mistral": {**SIZES, "num_key_value_heads": 2, "sliding_window": 6},
    "gpt2": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "phi": SIZES,
    "granite": {**SIZES, "num_key_value_heads": 2, "logits_scaling": 4.0},  # logits divided
    "cohere": {**SIZES, "num_key_value_heads": 2, "logit_scale": 0.3},  # logits multiplied
    "gemma2": {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 0.4},
}


def make(family: str, **options: Any) -> PretrainedLM:
    torch.manual_seed(0)
    model = PretrainedLM(config={"model_type": family, **FAMILIES[family]}, **options)
    with torch.no_grad():  # initial logits are near 0, where most errors would be too small to see
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    model.take_probe(probe_head(model))
    return model


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor([20, 7, 13, 4, 18])
    tokens = torch.randint(3, V, (5, 20))
    mask = torch.arange(20) < lengths[:, None]
    targets = mask & (torch.arange(20) >= torch.tensor([8, 2, 10, 1, 17])[:, None])
    return {"tokens": tokens.where(mask, 0), "mask": mask, "targets": targets}


def plain_logprobs(model: PretrainedLM, rows: dict[str, Tensor]) -> Tensor:
    """Compute the log-probs of the targets with the model of transformers and its own attention mask."""
    logits = model.model(input_ids=rows["tokens"], attention_mask=rows["mask"].long()).logits.double()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, rows["tokens"][:, 1:, None]).squeeze(-1)
    return logps[rows["targets"][:, 1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_equal_those_of_transformers(family: str) -> None:
    model, rows = make(family), batch()
    assert has_hidden(model)
    fast, _ = token_logprobs(model, rows)  # type: ignore[arg-type]
    plain = plain_logprobs(model, rows)
    assert float((fast.double() - plain).detach().abs().max()) < 1e-5
    weights = torch.linspace(-1, 1, len(plain))
    gradients = []
    for logps in (fast, plain.float()):
        model.zero_grad()
        (logps * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 5
    scale = max(float(g.abs().max()) for g in gradients[1].values())
    assert largest_difference(*gradients) < 1e-5 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_decoding_equals_generate_of_transformers(family: str) -> None:
    model = make(family)
    prompts = [list(range(5, 17)), [3, 4, 5], [50]]
    assert has_cache(model)
    ours = generate(model, prompts, GenerationConfig(max_new_tokens=10, temperature=0.0, num_samples=2), eos_id=None)
    for prompt, samples in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        for sample in samples:
            assert sample.tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mamba", {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        ("lfm2", {**SIZES, "num_key_value_heads": 2, "full_attn_idxs": [1]}),
    ],
)
def test_models_that_keep_a_state_decode_without_a_cache(family: str, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = PretrainedLM(config={"model_type": family, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    assert has_hidden(model) and not has_cache(model)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    answers = generate(model, prompts, GenerationConfig(max_new_tokens=6, temperature=0))
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer.tokens])
        assert model(tokens)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_is_read_back(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make(family)
    write_model(model, whole_weights(model), tmp_path / "out", card="# card")
    assert {file.suffix or file.name for file in (tmp_path / "out").iterdir()} == {".json", ".safetensors", ".md", "SHA256SUMS"}
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1, "a server may run as another user"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = batch()["tokens"]
    assert largest_difference(dict(theirs.state_dict()), dict(model.model.state_dict())) == 0
    assert float((theirs(tokens).logits - model(tokens)).detach().abs().max()) < 1e-6
    again = read_model(tmp_path / "out")
    assert isinstance(again, PretrainedLM)
    assert float((again(tokens) - model(tokens)).detach().abs().max()) < 1e-6
    spec = backbone_spec(again)
    assert spec is not None
    rebuilt = build_backbone(spec)
    assert largest_difference(dict(rebuilt.state_dict()), dict(again.state_dict())) == 0


def test_scales_and_soft_caps_are_exact() -> None:
    assert [make(family)._scale for family in ("llama", "granite", "cohere", "gemma2")] == [1.0, 0.25, 0.3, 1.0]
    assert [make(family).head.softcap for family in ("llama", "gemma2")] == [None, 0.4]  # type: ignore[union-attr]


def test_logits_of_an_unknown_head_are_used_as_they_are() -> None:
    """The head is of an unknown kind, so the model does not offer a head and everything is computed from its logits."""
    model, rows = make("llama"), batch()
    model.model.lm_head.register_forward_hook(lambda _, __, logits: logits + logits.sin())
    model.take_probe(probe_head(model))
    assert not has_hidden(model) and not has_cache(model)
    fast, _ = token_logprobs(model, rows)  # type: ignore[arg-type]
    assert float((fast.double() - plain_logprobs(model, rows)).detach().abs().max()) < 1e-5
    theirs = model.model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    ((found,),) = generate(model, [[5, 6]], GenerationConfig(max_new_tokens=4, temperature=0.0), eos_id=None)
    assert found.tokens == theirs[0, 2:].tolist()


def test_a_checkpoint_is_enough_if_the_folder_is_gone(tmp_path: Path) -> None:
    model = make("llama")
    write_model(model, whole_weights(model), tmp_path / "out")
    spec = backbone_spec(read_model(tmp_path / "out"))
    assert spec is not None
    (tmp_path / "out").rename(tmp_path / "gone")
    skeleton = build_backbone(spec)
    with pytest.raises(ValueError, match=r"there is no such folder.*No checkpoint has been loaded"):
        skeleton(batch()["tokens"])
    skeleton.load_state_dict(model.state_dict())
    assert torch.equal(skeleton(batch()["tokens"]), model(batch()["tokens"]))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, saving = make("llama").train(), make("llama", gradient_checkpointing=True).train()
    for model in (plain, saving):
        response_logprobs(model, batch()).sums.sum().backward()  # type: ignore[arg-type]
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in (plain, saving)]
    assert largest_difference(*gradients) == 0


def test_bad_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`name` or `config` must be set"):
        PretrainedLM()
    with pytest.raises(ValueError, match="there is no such folder"):
        PretrainedLM(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        PretrainedLM(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="must describe a causal language model, but model_type 'clip'"):
        PretrainedLM(config={"model_type": "clip"})
    model = make("llama")
    model.model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights must be safetensors"):
        PretrainedLM(str(tmp_path / "pickled"))


def test_the_hub_is_asked_once_with_a_short_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    from lightning_align.data.tokenizer import load_tokenizer

    asked = []

    def nobody(_: HfApi, name: str, **options: Any) -> Any:
        asked.append((name, options["timeout"]))
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", nobody)
    hub.out_of_reach.cache_clear()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("transformers tries again, for half a minute"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the Hugging Face hub did not provide it .* Without a network, pass .* \./my"):
            PretrainedLM("somebody/some-model")
        with pytest.raises(ValueError, match=r"cannot be loaded by transformers .* Without a network, give the"):
            load_tokenizer("somebody/some-model")
    # The tokenizer passes no revision.
    assert asked == [("somebody/some-model", hub.SECONDS)] * 2
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    assert not hub.out_of_reach("somebody/other-model")


def test_the_output_layer_is_probed_again_for_other_weights() -> None:
    model = make("granite")
    scale = model._scale
    assert scale is not None and scale != 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert model._probe() == model._scale == pytest.approx(scale)
