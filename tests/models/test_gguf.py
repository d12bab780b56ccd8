"""GGUF files: the weights that were written, dequantized, with the tokenizer and the chat template of the file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_align.data.tokenizer import TransformersTokenizer, load_tokenizer
from lightning_align.models.pretrained import PretrainedLM

gguf = pytest.importorskip("gguf", reason="needs gguf")
transformers = pytest.importorskip("transformers", reason="needs transformers")

LETTERS = [chr(code) for code in range(33, 127)]
TOKENS = ["<unk>", "<|im_start|>", "<|im_end|>", *LETTERS, "Ġ", "ab"]
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The order of llama.cpp, which rotates neighboring dimensions, where transformers rotates the halves of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape_as(weight)


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(TOKENS), **CONFIG)).eval()
    return model


def write(path: Path, model: torch.nn.Module, kind: gguf.GGMLQuantizationType) -> Path:
    """Write a model of transformers as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *(1 for _ in TOKENS[3:])])  # 3: a control token
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            there = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            there = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        if ".attn_q." in there:
            weight = interleaved(weight, CONFIG["num_attention_heads"])
        if ".attn_k." in there:
            weight = interleaved(weight, CONFIG["num_key_value_heads"])
        values = weight.numpy().astype(np.float32)
        if weight.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(there, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(there, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_in_float32_are_read_exactly(llama: torch.nn.Module, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32)
    found = PretrainedLM(str(path))
    tokens = torch.randint(3, len(TOKENS), (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(found(tokens), llama(tokens).logits, rtol=0, atol=1e-5)
        assert found.model.lm_head.weight is found.model.model.embed_tokens.weight


def test_quantized_weights_are_dequantized_train_and_are_exported(llama: torch.nn.Module, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    found = PretrainedLM(str(write(tmp_path / "tiny.gguf", llama, kind)))
    down = llama.model.layers[1].mlp.down_proj.weight.detach().numpy()  # type: ignore[union-attr, index]
    exact = gguf.quants.dequantize(gguf.quants.quantize(down, kind), kind)
    assert np.array_equal(found.model.model.layers[1].mlp.down_proj.weight.detach().numpy(), exact)
    assert {p.dtype for p in found.parameters()} == {torch.float32} and all(p.requires_grad for p in found.parameters())
    tokens = torch.randint(3, len(TOKENS), (2, 20))
    found(tokens).square().mean().backward()
    assert all(p.grad is not None for p in found.parameters())
    found.model.save_pretrained(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "llama"
    again = PretrainedLM(str(tmp_path / "export"))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), found(tokens), rtol=0, atol=0)


def test_the_tokenizer_and_its_template_come_from_the_file(llama: torch.nn.Module, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32)
    tokenizer = load_tokenizer(str(path))
    assert isinstance(tokenizer, TransformersTokenizer)
    (encoding,) = tokenizer.encode_batch(["cab d"])
    assert list(encoding.ids) == [TOKENS.index(text) for text in ("c", "ab", "Ġ", "d")]
    assert tokenizer.eos_id == 2 and tokenizer.has_template and tokenizer.template == TEMPLATE
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("read", [PretrainedLM, load_tokenizer])
def test_files_that_cannot_be_read_are_named(read: type, llama: torch.nn.Module, tmp_path: Path) -> None:
    whole = write(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32).read_bytes()
    cases = {"absent.gguf": (None, "no such file"), "text.gguf": (b"text", "not a GGUF file"), "empty.gguf": (b"", "GGUF")}
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            read(str(tmp_path / name))
    (tmp_path / "cut.gguf").write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        read(str(tmp_path / "cut.gguf"))


def test_without_the_package_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("lightning_align.runtime.gguf.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-align\[gguf\]'"):
        PretrainedLM(str(tmp_path / "some.gguf"))
