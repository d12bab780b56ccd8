"""Products with weights of 8 bits against float64, and generation with them against a model that has the rounded weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_align.generation import int8
from lightning_align.generation.packing import pack, packed_linears
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.lora import LoRAConfig, add_lora, lora_layers
from tests.toys import tiny_palm

pytestmark = pytest.mark.skipif(int8.problem() is not None, reason=str(int8.problem()))


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "LEAST", 1)


def rounded(weight: Tensor) -> Tensor:
    """The weights that products use, (V, D): multiples of a 127th of the largest of each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outlier", [1.0, 300.0], ids=["plain", "with a large activation"])
def test_products_are_those_of_the_rounded_weights(outlier: float, dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(300, 200, dtype=dtype), torch.randn(300, dtype=dtype), torch.randn(7, 200, dtype=dtype)
    x[:, 3] *= outlier
    expected = x.double() @ rounded(weight.float()).double().T + bias.double()
    found = int8.Int8Weights().linear(weight, bias)(x)
    assert found.dtype is dtype
    # Each of 200 activations is off by at most half a step, which is a 63rd of a 126th of the largest of its row.
    bound = 0.5 / 63 / 126 * x.double().abs().amax(1, keepdim=True) * rounded(weight.float()).double().abs().sum(1)
    assert ((found.double() - expected).abs() <= bound + torch.finfo(dtype).eps * (1 + expected.abs())).all()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-3 if dtype is torch.float32 else 4e-3)


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    linear = int8.Int8Weights().linear(torch.randn(96, 64), torch.randn(96))
    x = torch.randn(33, 64) * torch.logspace(-20, 4, 33)[:, None]
    together = linear(x)
    for number in range(33):
        assert torch.equal(linear(x[number : number + 1])[0], together[number])
    assert torch.equal(linear(x[:32].view(4, 8, 64)), together[:32].view(4, 8, 96))


def test_zeros_and_no_rows() -> None:
    weight, bias = torch.randn(5, 8), torch.randn(5)
    weight[2] = 0
    linear = int8.Int8Weights().linear(weight, bias)
    assert torch.equal(linear(torch.zeros(2, 8)), bias.expand(2, 5))
    assert linear(torch.ones(1, 8))[0, 2] == bias[2]
    assert linear(torch.ones(0, 3, 8)).shape == (0, 3, 5)


def test_weights_are_rounded_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    make = int8._packed
    monkeypatch.setattr(int8, "_packed", lambda weight: calls.append(1) or make(weight))
    model, kept, x = nn.Linear(8, 4), int8.Int8Weights(), torch.ones(1, 8)
    with torch.no_grad():
        for _ in range(2):
            with packed_linears(model, kept):
                first = model(x)
        assert len(calls) == 1
        model.weight.mul_(2)
        with packed_linears(model, kept):
            torch.testing.assert_close(model(x) - model.bias, 2 * (first - model.bias))
    assert len(calls) == 2 and "forward" not in vars(model)
    small = nn.Linear(200, 200)
    monkeypatch.setattr(int8, "LEAST", 40_001)
    with packed_linears(small, kept):
        pass
    assert len(calls) == 2, "a small weight stays as it is"


def test_adapters_stay_exact() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(16, 16)})
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora["default"].B.normal_()
        x, layer = torch.randn(3, 16), model["layer"]
        adapter = layer.lora["default"](x)
        with packed_linears(model, int8.Int8Weights()):
            found = layer(x)
        expected = x @ rounded(layer.weight).T + layer.bias + adapter
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert "apply_weight" not in vars(layer)


def test_log_probs_of_responses_are_those_of_the_model_with_rounded_weights() -> None:
    model = tiny_palm(num_tokens=64, dim=32, tie_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # far from saturated, so that the last bits of activations change little
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in other.modules():
            if type(module) is nn.Linear:
                module.weight.copy_(rounded(module.weight))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
    answers = {
        size: generate(model, prompts, GenerationConfig(max_new_tokens=12, batch_size=size, quantization="int8"))
        for size in (1, 3, 64)
    }
    assert answers[1] == answers[3] == answers[64]
    gaps = {}
    for name, scorer in (("rounded", other), ("plain", model)):
        each = []
        for prompt, (answer,) in zip(prompts, answers[3], strict=True):
            tokens = torch.tensor([prompt + answer.tokens])
            with torch.no_grad():
                logprobs = scorer(tokens).log_softmax(-1)[0, len(prompt) - 1 : -1]
            each += (logprobs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0] - torch.tensor(answer.logprobs)).tolist()
        gaps[name] = max(map(abs, each))
    assert gaps["rounded"] < 1e-3
    assert gaps["plain"] > 2 * gaps["rounded"], "rounding changes nothing, so agreement says nothing"


def test_the_setting_is_recorded_and_refused_where_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "quantization" not in GenerationConfig().recorded()
    assert GenerationConfig(quantization="int8").recorded()["quantization"] == "int8"
    with pytest.raises(ValueError, match=r"`quantization` of GenerationConfig must be null here, but got 'int8'.*on cuda:0"):
        int8.check(torch.device("cuda", 0), sharded=False)
    with pytest.raises(ValueError, match="the model is sharded"):
        int8.check(torch.device("cpu"), sharded=True)
    with pytest.raises(ValueError, match="quantization"):
        GenerationConfig(quantization="int4")  # type: ignore[arg-type]

    def missing(weight: Tensor) -> None:
        raise RuntimeError("no such routine\nin detail")

    monkeypatch.setattr(int8, "_packed", missing)
    int8.problem.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"on this processor \(no such routine\). Remove the setting"):
            generate(tiny_palm(), [[1]], GenerationConfig(quantization="int8"))
    finally:
        int8.problem.cache_clear()
    assert pack(torch.randn(300, 200), None) is not None, "nothing is left of it"
