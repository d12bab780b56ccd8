"""Models and adapters in the formats of transformers and PEFT give the same logits after writing and reading."""

import json
from pathlib import Path

import pytest
import torch

from lightning_align.models.formats import merged_weights, read_adapter, read_model, whole_weights, write_adapter, write_model
from lightning_align.models.lora import LoRAConfig, add_lora, lora_layers
from tests.models.test_pretrained import batch, make
from tests.toys import largest_difference, tiny_palm

TOKENS = batch()["tokens"]


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for adapter in layer.lora.values():
                adapter.B.normal_(std=0.3)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_our_adapters(rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, base = make("llama"), make("llama")
    add_lora(model, LoRAConfig(rank=3, alpha=5, rslora=rslora, targets=["q_proj", "down_proj"]))
    randomize(model)
    write_adapter(model, whole_weights(model), tmp_path / "adapter")
    modes = {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1, "the weights must have the permissions of the configuration"
    theirs = peft.PeftModel.from_pretrained(base.model, tmp_path / "adapter")
    difference = (theirs(input_ids=TOKENS).logits - model(TOKENS)).detach().abs().max()
    assert float(difference) < 1e-5
    again = make("llama")
    assert len(read_adapter(again, tmp_path / "adapter")) == 4
    assert float((again(TOKENS) - model(TOKENS)).detach().abs().max()) < 1e-5


def test_we_read_the_adapters_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        make("llama").model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, plain = make("llama"), make("llama")
    read_adapter(ours, tmp_path / "adapter")
    assert float((theirs(input_ids=TOKENS).logits - ours(TOKENS)).detach().abs().max()) < 1e-5
    assert float((plain(TOKENS) - ours(TOKENS)).detach().abs().max()) > 0.01
    with pytest.raises(ValueError, match="is of another base model than this PretrainedLM"):
        read_adapter(make("gpt2"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="must be plain LoRA, but is LORA with use_dora"):
        read_adapter(make("llama"), tmp_path / "adapter")


def test_adapters_are_merged_when_a_model_is_written(tmp_path: Path) -> None:
    model = make("mistral")
    add_lora(model, LoRAConfig(rank=2))
    randomize(model)
    write_model(model, merged_weights(model, whole_weights(model)), tmp_path / "out")
    assert float((read_model(tmp_path / "out")(TOKENS) - model(TOKENS)).detach().abs().max()) < 1e-4


def test_a_palm_is_read_back(tmp_path: Path) -> None:
    model = tiny_palm(num_tokens=96)
    write_model(model, whole_weights(model), tmp_path / "out")
    again = read_model(tmp_path / "out")
    assert largest_difference(dict(again.state_dict()), dict(model.state_dict())) == 0
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_errors_name_what_cannot_be_written_or_read(tmp_path: Path) -> None:
    model = tiny_palm(num_tokens=96)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be a folder, but .* is a file"):
        write_model(model, {}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"contains other files and no config\.json"):
        write_model(model, {}, tmp_path)
    with pytest.raises(ValueError, match="must have `init_args`"):
        write_model(torch.nn.Linear(2, 2), {}, tmp_path / "out")
    with pytest.raises(ValueError, match="no adapters of scope 'default'"):
        write_adapter(model, {}, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"must contain config\.json"):
        read_model(tmp_path)
    with pytest.raises(ValueError, match=r"must contain adapter_config\.json"):
        read_adapter(model, tmp_path)
