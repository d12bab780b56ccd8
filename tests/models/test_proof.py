"""Exports are read back and compared: each way in which a writer could lose a part of a model is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_align.models import formats, merging, peft_adapters
from lightning_align.models.folders import PARTIAL, replaced_folder
from lightning_align.models.formats import merged_weights, read_model, whole_weights, write_adapter, write_model
from lightning_align.models.language_model import logits_of
from lightning_align.models.lora import LoRAConfig, add_lora, lora_parameters, merge_lora, unmerge_lora
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.proof import expected_logits, fixed_batch
from tests.models.test_pretrained import make
from tests.toys import tiny_palm

TOKENS = torch.tensor([[3, 90, 41, 17, 8, 60], [5, 6, 7, 95, 0, 1]])
TIED = "qwen3"


def stir(model: torch.nn.Module) -> None:
    """Move all that trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def difference(folder: Path, model: torch.nn.Module) -> float:
    """Return the largest difference of logits to what transformers reads, in standard deviations."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        ours = logits_of(model.eval(), TOKENS)
        theirs = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    return float((theirs - ours).abs().max() / ours.std())


def export(model: torch.nn.Module, folder: Path, **options: Any) -> None:
    write_model(model, merged_weights(model, whole_weights(model)), folder, **options)


# -- faults of writers


def _lose_a_norm(model: Any, weights: Any) -> Any:
    inner, state = merging.transformers_weights(model, weights)
    name = next(name for name in state if name.endswith("layernorm.weight"))
    return inner, {**state, name: torch.ones_like(state[name])}


def _swap_layers(model: Any, weights: Any) -> Any:
    inner, state = merging.transformers_weights(model, weights)
    a, b = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    return inner, {**state, a: state[b], b: state[a]}


def _drop(model: Any, weights: Any) -> Any:
    inner, state = merging.transformers_weights(model, weights)
    return inner, {name: value for name, value in state.items() if "layers.1.mlp" not in name}


def _transpose(model: Any, weights: Any) -> Any:
    inner, state = merging.transformers_weights(model, weights)
    name = "model.layers.0.mlp.up_proj.weight"
    return inner, {**state, name: state[name].T.contiguous()}


def _one_embedding(model: Any, weights: Any) -> Any:
    inner, state = merging.transformers_weights(model, weights)
    moved = state["model.embed_tokens.weight"].clone()
    unread = next(i for i in range(len(moved)) if i not in fixed_batch(model))
    moved[unread] += 1
    return inner, {**state, "model.embed_tokens.weight": moved}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_lose_a_norm, "its logits differ by"),
        (_swap_layers, "its logits differ by"),
        (_drop, "missing keys"),
        (_transpose, "Nothing was exported"),
        (_one_embedding, "embeddings of the trained model, but that of token"),
    ],
)
def test_a_fault_of_the_writer_stops_the_export(
    fault: Callable[..., Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    export(model, tmp_path / "out")
    earlier = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    stir(model)
    monkeypatch.setattr(formats, "transformers_weights", fault)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == earlier
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unread_scale_in_the_configuration_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration can lose a setting, too, that no weight shows."""
    model, write = make("llama"), formats._write_transformers

    def lose_a_setting(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        config = Path(arguments[2]) / "config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})
        )

    monkeypatch.setattr(formats, "_write_transformers", lose_a_setting)
    with pytest.raises(ValueError, match="its logits differ by"):
        export(model, tmp_path / "out")


def test_weights_that_are_not_numbers_are_not_exported(tmp_path: Path) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="must have finite logits"):
        export(model, tmp_path / "out")


def test_the_old_way_of_merging_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that PEFT trains whole were lost, because only adapters of layers were merged."""
    pytest.importorskip("peft", reason="needs the extra hf")
    make("llama").model.save_pretrained(tmp_path / "base")
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}
    model = PretrainedLM(str(tmp_path / "base"), adapter=config)
    stir(model)

    def of_before(inner: Any, *, merge: bool = True) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for name, layer in list(inner.named_modules()):
            parent, _, last = name.rpartition(".")
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                setattr(inner.get_submodule(parent), last, layer.get_base_layer())
            elif isinstance(layer, AuxiliaryTrainingWrapper):
                setattr(inner.get_submodule(parent), last, layer.original_module)
        inner._hf_peft_config_loaded = False
        del inner.peft_config

    with monkeypatch.context() as old:
        old.setattr(merging, "unload_peft", of_before)
        with pytest.raises(ValueError, match="its logits differ by"):
            export(model, tmp_path / "out")
    export(model, tmp_path / "out")
    assert difference(tmp_path / "out", model) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_rounds_but_does_not_fail(family: str, tmp_path: Path) -> None:
    model = make(family).to(torch.bfloat16)
    export(model, tmp_path / "out")
    assert expected_logits(model).tolerance > 1e-3


def test_the_mode_and_the_precision_of_the_caller_stay(tmp_path: Path) -> None:
    model = make("llama").train()
    model.model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    torch.set_float32_matmul_precision("high")
    try:
        export(model, tmp_path / "out")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [module.training for module in model.modules()] == before
    assert len({module.training for module in model.modules()}) == 2


# -- tied layers


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"]])
def test_an_adapter_on_a_tied_output_layer_leaves_the_embedding(targets: list[str], tmp_path: Path) -> None:
    model = make(TIED)
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    add_lora(model, LoRAConfig(rank=2, targets=targets))
    for parameter in lora_parameters(model, "default"):
        parameter.data.normal_(std=0.3)
    expected = model(TOKENS).detach()
    export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.model.config.tie_word_embeddings, "writing must not change the model"
    assert difference(tmp_path / "out", model) < 1e-4
    # The same where the adapter is merged in place, and taken out again.
    merge_lora(model, "default")
    assert not model.model.config.tie_word_embeddings
    torch.testing.assert_close(model(TOKENS).detach(), expected, atol=1e-4, rtol=0)
    unmerge_lora(model, "default")
    weights = model.model.lm_head.weight, model.model.model.embed_tokens.weight
    torch.testing.assert_close(weights[0], weights[1])


def test_tied_layers_stay_tied_where_nothing_parts_them(tmp_path: Path) -> None:
    model = make(TIED)
    add_lora(model, LoRAConfig(rank=2, targets=["q_proj"]))
    for parameter in lora_parameters(model, "default"):
        parameter.data.normal_(std=0.3)
    export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert difference(tmp_path / "out", model) < 1e-4


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 93]},
    ],
    ids=["lora on lm_head", "lora on embedding", "lm_head whole", "embedding whole", "two tokens"],
)
@pytest.mark.parametrize("family", ["llama", TIED])
def test_adapters_of_peft_on_embeddings_and_heads(adapter: dict[str, Any], family: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra hf")
    make(family).model.save_pretrained(tmp_path / "base")
    model = PretrainedLM(str(tmp_path / "base"), adapter={"r": 2, "init_lora_weights": False, **adapter})
    stir(model)
    export(model, tmp_path / "out")
    assert difference(tmp_path / "out", model) < 1e-4
    again = read_model(tmp_path / "out")
    assert float((again(TOKENS) - model.eval()(TOKENS)).detach().abs().max() / again(TOKENS).detach().std()) < 1e-4
    write_adapter(model, whole_weights(model), tmp_path / "adapter")
    alone = PretrainedLM(str(tmp_path / "base"), adapter=str(tmp_path / "adapter")).eval()
    assert float((alone(TOKENS) - model(TOKENS)).detach().abs().max()) < 1e-4


# -- folders


def test_shards_and_single_files_replace_each_other(tmp_path: Path) -> None:
    out, model = tmp_path / "out", make("llama")
    for size, count in (("5GB", 1), ("30KB", 3), ("5GB", 1), ("60KB", 2)):
        stir(model)
        export(model, out, max_shard_size=size)
        shards = sorted(file.name for file in out.glob("*.safetensors"))
        assert len(shards) >= count and (shards == ["model.safetensors"]) == (count == 1)
        assert (out / "model.safetensors.index.json").exists() == (count > 1)
        assert difference(out, model) < 1e-5


def test_an_export_leaves_other_files_and_removes_a_stale_tokenizer(tmp_path: Path) -> None:
    out, model = tmp_path / "out", make("llama")
    export(model, out, card="# first")
    for name in ("notes.txt", "tokenizer.json", "model-00001-of-00002.safetensors"):
        (out / name).write_text("old")
    (out / "results").mkdir()
    export(model, out)
    names = {file.name for file in out.iterdir()}
    assert {"notes.txt", "results", "config.json", "model.safetensors"} <= names
    assert not {"tokenizer.json", "model-00001-of-00002.safetensors", "README.md", PARTIAL} & names


def test_an_export_that_is_stopped_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the files have moved, nothing opens the folder, and the next export replaces it."""
    import os

    model, renames = make("llama"), os.replace
    for moved in range(3):
        out, count = tmp_path / str(moved), 0
        export(model, out)

        def stop(source: Any, target: Any, moved: int = moved) -> None:
            nonlocal count
            if Path(source).parent.name == PARTIAL and not Path(target).name.startswith("."):
                if Path(target).parent.name != PARTIAL:
                    if count == moved:
                        raise KeyboardInterrupt
                    count += 1
            renames(source, target)

        with monkeypatch.context() as interrupted:
            interrupted.setattr("lightning_align.models.folders.os.replace", stop)
            interrupted.setattr("lightning_align.models.folders.shutil.rmtree", lambda *_, **__: None)  # as if killed
            with pytest.raises(KeyboardInterrupt):
                export(model, out)
        with pytest.raises(ValueError, match=r"must contain config\.json"):
            read_model(out)
        export(model, out)
        assert difference(out, model) < 1e-5 and not (out / PARTIAL).exists()


def test_a_disk_that_is_full_leaves_the_earlier_export(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out: the export cannot be written \(No space left on device\)"):
        with replaced_folder(tmp_path / "out", "config.json") as partial:
            (partial / "config.json").write_text('{"new": 1}')
            raise OSError(28, "No space left on device")
    assert (tmp_path / "out" / "config.json").read_text() == "{}" and len(list((tmp_path / "out").iterdir())) == 1


# -- adapters alone


def test_adapters_do_not_name_a_base_that_is_another_model(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra hf")
    make("llama").model.save_pretrained(tmp_path / "base")
    model = PretrainedLM(str(tmp_path / "base"))
    add_lora(model, LoRAConfig(rank=2, targets=["q_proj"]))
    for parameter in lora_parameters(model, "default"):
        parameter.data.normal_(std=0.3)
    config = tmp_path / "adapter" / "adapter_config.json"
    write_adapter(model, whole_weights(model), tmp_path / "adapter")
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    with torch.no_grad():
        model.model.model.norm.weight.mul_(1.5)  # as after full training, before the adapters
    write_adapter(model, whole_weights(model), tmp_path / "adapter")
    assert json.loads(config.read_text())["base_model_name_or_path"] is None


def test_damage_to_adapters_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_palm()
    add_lora(model, LoRAConfig(rank=2))
    for parameter in lora_parameters(model, "default"):
        parameter.data.normal_(std=0.3)
    write_adapter(model, whole_weights(model), tmp_path / "adapter")

    def half(state: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        save_file({name: value * (2 if "lora_B" in name else 1) for name, value in state.items()}, path, **options)

    monkeypatch.setattr("lightning_align.models.adapter_files.save_file", half)
    with pytest.raises(ValueError, match="its logits differ by"):
        write_adapter(model, whole_weights(model), tmp_path / "adapter")


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("start", [True, "pissa", "olora"])
def test_adapters_that_move_their_base_are_not_written_alone(start: Any, bias: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra hf")
    make("phi").model.save_pretrained(tmp_path / "base")  # with biases
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": start, "bias": bias}
    model = PretrainedLM(str(tmp_path / "base"), adapter=config)
    assert model.start == peft_adapters.AdapterStart(on_is_base=True, off_is_base=start is True and bias == "none")
    stir(model)
    export(model, tmp_path / "out")
    assert difference(tmp_path / "out", model) < 1e-4
    if model.start.off_is_base:
        write_adapter(model, whole_weights(model), tmp_path / "adapter")
        return
    with pytest.raises(ValueError, match="cannot be written alone"):
        write_adapter(model, whole_weights(model), tmp_path / "adapter")
