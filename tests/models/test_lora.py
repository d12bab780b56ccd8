"""LoRA scopes against the dense formula, and the parts of a model that they must not change."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.formats import merged_weights, read_adapter, read_model, whole_weights, write_adapter, write_model
from lightning_align.models.language_model import has_hidden
from lightning_align.models.lora import (
    LoRAConfig,
    LoRALayer,
    LoRALinear,
    add_lora,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    train_only,
    unmerge_lora,
    use_lora,
    using_lora,
)
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.scoring.sums import response_logprobs
from tests.models.test_pretrained import make
from tests.toys import VOCABULARY, gap, slow_logprobs, state_of, tiny_palm, token_batch

EXACT = {"rtol": 0.0, "atol": 0.0}


def tokens_of() -> Tensor:
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(4))


def fill(model: nn.Module, scope: str) -> None:
    with torch.no_grad():
        for parameter in lora_parameters(model, scope):
            parameter.normal_(std=0.3)


def layer_with(config: LoRAConfig, *, inputs: int = 6, outputs: int = 5, bias: bool = True) -> LoRALinear:
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    add_lora(model, config)
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    return layer


def test_it_starts_as_the_plain_model() -> None:
    model, tokens = tiny_palm(), tokens_of()
    before, keys = model(tokens), state_of(model)
    names = add_lora(model, LoRAConfig(rank=3))
    assert sorted(names) == sorted(f"blocks.{i}.{n}" for i in range(2) for n in ("in_proj", "attn_out", "ff_out"))
    torch.testing.assert_close(model(tokens), before, **EXACT)
    # A must not be zero, or nothing would ever train.
    assert all(float(layer.lora["default"].A.detach().std()) > 0 for _, layer in lora_layers(model))
    # The base keeps its names, so a checkpoint of the plain model still loads.
    assert set(keys) == {name for name in model.state_dict() if ".lora." not in name}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / math.sqrt(4))])
def test_the_adapter_follows_the_dense_formula(rslora: bool, scale: float) -> None:
    layer = layer_with(LoRAConfig(rank=4, alpha=12, rslora=rslora)).double()
    A, B = lora_parameters(layer, "default")
    with torch.no_grad():
        B.normal_()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    expected = x @ (layer.weight.T + scale * (A @ B)) + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_a_begins_kaiming_uniform() -> None:
    A, B = lora_parameters(layer_with(LoRAConfig(rank=32), inputs=400, outputs=3), "default")
    assert float(A.detach().std()) == pytest.approx((3 * 400) ** -0.5, rel=0.02)
    assert float(A.detach().abs().max()) <= 400**-0.5
    assert not B.any()


def test_the_product_of_its_factors_is_never_formed() -> None:
    """The layer needs 2 T in out operations, its adapter 2 T r (in + out). The product A @ B would add 2 in r out."""
    layer, rows = layer_with(LoRAConfig(rank=2), inputs=50, outputs=40, bias=False), 3
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        layer(torch.randn(rows, 50))
    assert counter.get_total_flops() == 2 * rows * 50 * 40 + 2 * rows * 2 * (50 + 40)


def test_dropout_acts_in_training_only() -> None:
    layer, x = layer_with(LoRAConfig(rank=4, dropout=0.5)), torch.randn(4, 6)
    fill(layer, "default")
    assert gap(layer(x), layer(x)) > 0
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), **EXACT)


def test_an_adapter_added_to_a_model_in_evaluation_mode_is_in_it() -> None:
    model = tiny_palm().eval()
    add_lora(model, LoRAConfig(dropout=0.5))
    assert not any(module.training for module in model.modules())


def test_switching_off_and_nesting() -> None:
    model, tokens = tiny_palm(), tokens_of()
    plain = model(tokens)
    for scope in ("a", "b"):
        add_lora(model, LoRAConfig(rank=2, scope=scope), active=scope == "a")
        fill(model, scope)
    with_a = model(tokens)
    assert gap(with_a, plain) > 0.01
    with using_lora(model, "b"):
        with_b = model(tokens)
        with lora_disabled(model):
            torch.testing.assert_close(model(tokens), plain, **EXACT)
            with using_lora(model, "a", "b"):
                both = model(tokens)
        torch.testing.assert_close(model(tokens), with_b, **EXACT)
    torch.testing.assert_close(model(tokens), with_a, **EXACT)
    assert min(gap(with_a, with_b), gap(both, with_a), gap(both, with_b)) > 0.01
    with pytest.raises(RuntimeError, match="inside"), lora_disabled(model):
        raise RuntimeError("inside")
    torch.testing.assert_close(model(tokens), with_a, **EXACT)
    use_lora(model)
    torch.testing.assert_close(model(tokens), plain, **EXACT)


def test_merging_and_unmerging() -> None:
    model, tokens = tiny_palm(), tokens_of()
    plain, weights = model(tokens), state_of(model)
    add_lora(model, LoRAConfig(rank=2))
    fill(model, "default")
    adapted = model(tokens)
    merge_lora(model, "default")
    torch.testing.assert_close(model(tokens), adapted, rtol=0, atol=2e-6 * float(adapted.detach().abs().max()))
    assert gap(model.state_dict()["blocks.0.in_proj.weight"], weights["blocks.0.in_proj.weight"]) > 0.01
    unmerge_lora(model, "default")
    torch.testing.assert_close(model(tokens), adapted, rtol=0, atol=2e-6 * float(adapted.detach().abs().max()))
    for name, value in weights.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)
    remove_lora(model, "default")
    torch.testing.assert_close(model(tokens), plain, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == weights.keys()
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_a_removed_merged_scope_stays_in_the_weights() -> None:
    model, tokens = tiny_palm(), tokens_of()
    add_lora(model, LoRAConfig(rank=2))
    fill(model, "default")
    merge_lora(model, "default")
    merged = model(tokens)
    remove_lora(model, "default")
    torch.testing.assert_close(model(tokens), merged, **EXACT)
    add_lora(model, LoRAConfig(rank=2))  # the name is free again
    torch.testing.assert_close(model(tokens), merged, **EXACT)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["in_proj"], 2), (["*_out"], 4), (["blocks.1.*"], 3), (["blocks.0.ff_out", "attn_out"], 3), (["*"], 6)],
)
def test_patterns_match_the_last_part_or_the_whole(targets: list[str], count: int) -> None:
    model = tiny_palm()
    assert len(add_lora(model, LoRAConfig(targets=targets))) == count
    assert len(lora_layers(model)) == count


def test_the_output_layer_gets_an_adapter_only_if_it_is_named() -> None:
    model = tiny_palm(tie_embeddings=False)
    assert len(add_lora(model, LoRAConfig(rank=2))) == 6  # all but the output layer
    assert has_hidden(model)
    names = add_lora(model, LoRAConfig(rank=2, targets=["*", "to_logits"], scope="all"))
    assert len(names) == 7 and not has_hidden(model)  # log-probs from whole logits
    train_only(model, "all")
    with torch.no_grad():
        for parameter in lora_parameters(model, "all"):
            parameter.normal_(std=0.3)
    batch = token_batch([2, 3], [4, 2])
    sums = response_logprobs(model, batch).sums
    assert sums.tolist() == pytest.approx(slow_logprobs(model, batch)[0], rel=1e-5)
    sums.sum().backward()
    assert all(bool(parameter.grad is not None and parameter.grad.any()) for parameter in lora_parameters(model, "all"))
    (answer,) = generate(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=3, temperature=0))[0]
    tokens = torch.tensor([[1, 2, 3, *answer.tokens]])
    assert model(tokens)[0, 2:-1].argmax(-1).tolist() == answer.tokens
    with using_lora(model, "default"):
        assert has_hidden(model)
    merge_lora(model, "all")
    assert has_hidden(model)  # all of it is in the weight
    torch.testing.assert_close(response_logprobs(model, batch).sums, sums, rtol=1e-4, atol=1e-4)


def test_a_model_with_only_an_output_layer_is_an_error() -> None:
    model = tiny_palm(tie_embeddings=False)
    model.blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="excludes the output layer"):
        add_lora(model, LoRAConfig())


def test_only_a_scope_trains() -> None:
    model = tiny_palm()
    for scope in ("a", "b"):
        add_lora(model, LoRAConfig(rank=2, scope=scope))
    train_only(model, "b")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 12 and all(".lora.b." in name for name in trained)
    model(tokens_of()).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == trained


def test_conv1d_layers_of_gpt2_get_adapters(tmp_path: Path) -> None:
    """Their weight is (in, out). Each step is compared with the same adapters on linear layers."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="needs the extra hf").Conv1D
    torch.manual_seed(0)
    layer, linear = conv1d(5, 6).double(), nn.Linear(6, 5).double()
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    pair = nn.ModuleDict({"conv": layer, "linear": linear})
    assert add_lora(pair, LoRAConfig(rank=2)) == ["conv", "linear"]
    assert isinstance(layer, LoRALayer) and isinstance(linear, LoRALinear)
    fill(pair, "default")
    layer.lora["default"].load_state_dict(linear.lora["default"].state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-12)
    expected = layer(x).detach()
    merge_lora(pair, "default")
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.weight.T, linear.weight, rtol=0, atol=1e-12)
    unmerge_lora(pair, "default")
    remove_lora(pair, "default")
    assert type(layer) is conv1d

    # A whole model: exported merged, and as adapters that we and PEFT read.
    model, tokens = make("gpt2"), tokens_of()
    model.model.save_pretrained(tmp_path / "base")
    model = PretrainedLM(str(tmp_path / "base")).eval()
    assert len(add_lora(model, LoRAConfig(rank=2))) == 8
    fill(model, "default")
    trained = model(tokens).detach()
    write_model(model, merged_weights(model, whole_weights(model)), tmp_path / "merged")
    write_adapter(model, whole_weights(model), tmp_path / "adapter")
    ours = PretrainedLM(str(tmp_path / "base")).eval()
    read_adapter(ours, tmp_path / "adapter")
    theirs = PretrainedLM(str(tmp_path / "base"), adapter=str(tmp_path / "adapter")).eval()
    for again in (read_model(tmp_path / "merged"), ours, theirs):
        torch.testing.assert_close(again(tokens), trained, rtol=0, atol=1e-4)


def test_errors() -> None:
    model = tiny_palm()
    with pytest.raises(ValueError, match=r"\['wq'\] match none of \['attn_out', 'ff_out', 'in_proj'\]"):
        add_lora(model, LoRAConfig(targets=["wq"]))
    with pytest.raises(ValueError, match=r"no scope 'x'\. Its scopes are none"):
        use_lora(model, "x")
    add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="already has a scope 'default'"):
        add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match=r"no scope 'x'\. Its scopes are \['default'\]"):
        merge_lora(model, "x")
    with pytest.raises(ValueError, match="is not merged"):
        unmerge_lora(model, "default")
    merge_lora(model, "default")
    with pytest.raises(ValueError, match="is already merged"):
        merge_lora(model, "default")
    with pytest.raises(ValueError, match="cannot be switched off"), lora_disabled(model):
        pass

    class Odd(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"must be an nn.Linear, but is a Odd"):
        add_lora(nn.Sequential(Odd(2, 2)), LoRAConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, but got 0"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and less than 1, but got 1.0"),
        ({"scope": "a.b"}, "`scope` must be a name without dots, but got 'a.b'"),
        ({"scope": ""}, "`scope` must be a name without dots, but got ''"),
    ],
)
def test_impossible_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**values)
