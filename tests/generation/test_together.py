"""Rows decoded together equal rows decoded alone: the same tokens, log-probs, limits and ends."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.generation.packing import pack, packed_linears
from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.models.lora import LoRAConfig, add_lora, lora_parameters, using_lora
from lightning_align.models.pretrained import PretrainedLM
from tests.toys import VOCABULARY, Plain, tiny_palm

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8], [2, 8]]
SAMPLED = GenerationConfig(max_new_tokens=17, temperature=0.8, top_p=0.95, num_samples=3, seed=47)


def exact_palm() -> Any:
    """Build a tiny PaLM in float64. Kernels for different shapes then differ by about 1e-15 of a probability.

    Of all draws and top-p limits below, the closest to another decision is 3e-5 of the probability away from it.
    """
    return tiny_palm(dtype=torch.float64)


def config(**changes: object) -> GenerationConfig:
    return GenerationConfig(**{**vars(SAMPLED), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("plain", [False, True])
def test_samples_do_not_depend_on_batch_size_or_order(plain: bool) -> None:
    model: nn.Module = exact_palm()
    model = Plain(model) if plain else model
    expected = generate(model, PROMPTS, SAMPLED, eos_id=5)
    assert len({tuple(r.tokens) for row in expected for r in row}) > 10
    assert any(r.finished for row in expected for r in row) and any(not r.finished for row in expected for r in row)
    for size in (1, 2):
        assert generate(model, PROMPTS, config(batch_size=size), eos_id=5) == expected
    order = [3, 0, 4, 1, 2]
    assert generate(model, [PROMPTS[i] for i in order], SAMPLED, eos_id=5, ids=order) == [expected[i] for i in order]
    more = generate(model, PROMPTS, config(num_samples=4), eos_id=5)
    assert [row[:3] for row in more] == expected
    assert generate(model, PROMPTS, SAMPLED, eos_id=5, iteration=1) != expected


def test_decoding_with_and_without_a_cache_is_equal() -> None:
    model = exact_palm()
    assert generate(model, PROMPTS, SAMPLED, eos_id=5) == generate(Plain(model), PROMPTS, SAMPLED, eos_id=5)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_equal_those_of_the_model(temperature: float) -> None:
    model = exact_palm()
    results = generate(model, PROMPTS, config(temperature=temperature), eos_id=5)
    for prompt, responses in zip(PROMPTS, results, strict=True):
        for r in responses:
            ids = [*r.tokens, *([5] if r.finished else [])]
            with torch.no_grad():
                logps = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)
            expected = [float(logps[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)]
            assert r.logprobs == pytest.approx(expected, abs=1e-4)
            assert r.reason == ("eos" if r.finished else "length")


class Unselectable:
    """A cache without `select`."""

    def __init__(self, cache: object) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> object:
        if name == "select":
            raise AttributeError(name)
        return getattr(self._cache, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_cache":
            object.__setattr__(self, name, value)
        else:
            setattr(self._cache, name, value)


def test_a_cache_without_select_gives_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_palm()
    expected = generate(model, PROMPTS, SAMPLED, eos_id=5)
    make = model.make_cache
    monkeypatch.setattr(model, "make_cache", lambda batch, length: Unselectable(make(batch, length)))
    assert generate(model, PROMPTS, SAMPLED, eos_id=5) == expected


def test_finished_rows_leave_the_batch_and_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_palm()
    seen: list[tuple[int, int]] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, **k: seen.append(tuple(tokens.shape)) or hidden(tokens, **k))
    limits = [2, 2, 2, 2, 17]
    generate(model, PROMPTS, config(temperature=0), limits=limits)
    assert seen[0] == (5, 6)  # and not 15 rows
    assert seen[1] == (15, 1) and seen[-1] == (3, 1)


@pytest.mark.parametrize("plain", [False, True])
def test_every_row_has_its_own_limit(plain: bool) -> None:
    model: nn.Module = exact_palm()
    model = Plain(model) if plain else model
    whole = generate(model, PROMPTS, SAMPLED)
    limits = [1, 5, 99, 8, 4]
    cut = generate(model, PROMPTS, SAMPLED, limits=limits)
    for limit, long, short in zip(limits, whole, cut, strict=True):
        assert short == [Generation(r.tokens[:limit], False) for r in long]


def test_a_stop_text_ends_a_response() -> None:
    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)

    model = exact_palm()
    greedy = GenerationConfig(max_new_tokens=20, temperature=0)
    whole = [r.tokens for (r,) in generate(model, PROMPTS, greedy)]
    stop = decode(whole[0][5:8])
    results = generate(model, PROMPTS, GenerationConfig(20, temperature=0, stop=[stop, "absent"]), decode=decode)
    for tokens, (r,) in zip(whole, results, strict=True):
        place = decode(tokens).find(stop)
        expected = tokens if place < 0 else tokens[: place + len(stop)]
        assert (r.tokens, r.reason) == (expected, "length" if place < 0 else "stop")
    assert results[0][0].finished
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate(model, PROMPTS, GenerationConfig(stop=["a"]))
    with pytest.raises(ValueError, match="`stop` of GenerationConfig must be"):
        GenerationConfig(stop=[""])


def test_lora_scopes_decode() -> None:
    model = exact_palm()
    add_lora(model, LoRAConfig(rank=2))
    plain = generate(model, PROMPTS, SAMPLED)
    with torch.no_grad():
        for parameter in lora_parameters(model, "default"):
            parameter.normal_()
    adapted = generate(model, PROMPTS, SAMPLED)
    assert adapted != plain and adapted == generate(Plain(model), PROMPTS, SAMPLED)
    with using_lora(model):
        assert generate(model, PROMPTS, SAMPLED) == plain


def test_a_prompt_that_fills_the_context_raises() -> None:
    model = Plain(exact_palm())
    model.max_seq_len = 6
    with pytest.raises(ValueError, match="Prompt 1 has 6 tokens, but the context of the model has only 6"):
        generate(model, PROMPTS)
    with pytest.raises(ValueError, match="Prompt 21 has 6 tokens"):
        generate(model, PROMPTS, ids=range(20, 25))
    (result,) = generate(model, [[1, 2, 3, 4]], GenerationConfig(max_new_tokens=9))
    assert len(result[0].tokens) == 2


@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_equal_plain_products(bias: bool) -> None:
    linear = nn.Linear(200, 300, bias=bias)
    model = nn.Sequential(linear, nn.ReLU(), nn.Linear(300, 5))  # the second is too small to be packed
    x = torch.randn(3, 1, 200)
    with torch.no_grad():
        expected = model(x)
        with packed_linears(model):
            assert "forward" in vars(linear) and "forward" not in vars(model[2])
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            # One row, a prompt and a head each use another path.
            for other in (x[:1], x.view(1, 3, 200), x.view(3, 200)):
                rows = other.numel() // 200
                torch.testing.assert_close(model(other).view(rows, 1, 5), expected[:rows], rtol=1e-5, atol=1e-5)
        assert "forward" not in vars(linear)
        linear.weight.add_(1)
        assert not torch.allclose(model(x), expected)  # so the old packed weights are not used
    assert pack(linear.weight.half(), None) is None
    halves, packed = linear.bfloat16(), pack(linear.weight.bfloat16(), linear.bias)
    if packed is not None:  # only on processors with bfloat16 products
        torch.testing.assert_close(packed(x.bfloat16()), halves(x.bfloat16()), rtol=0.02, atol=0.02)


class Bounded(nn.Module):
    """A model with sixteen learned positions. Each token reads the previous one."""

    max_seq_len = 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places, self.out = nn.Embedding(11, 8), nn.Embedding(16, 8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        logits: Tensor = self.out(x + x.roll(1, 1))
        return logits


@pytest.mark.parametrize("cached", [False, True])
def test_no_row_of_a_batch_goes_past_the_context(cached: bool) -> None:
    if cached:
        pytest.importorskip("transformers")
        config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
        model: nn.Module = PretrainedLM(config=config).eval()
    else:
        model = Bounded()
    # When the long row is done, too few rows are done to be removed.
    prompts = [[1 + i, 2, 3] for i in range(7)] + [[4] * 14]
    together = generate(model, prompts, GenerationConfig(max_new_tokens=12, temperature=0))
    assert [len(answer.tokens) for (answer,) in together] == [12] * 7 + [2]
    for prompt, answers in zip(prompts, together, strict=True):
        assert generate(model, [prompt], GenerationConfig(max_new_tokens=12, temperature=0))[0] == answers


def test_packing_is_undone_after_an_error() -> None:
    linear = nn.Linear(200, 300)
    with pytest.raises(RuntimeError, match="inside"), packed_linears(linear):
        raise RuntimeError("inside")
    assert "forward" not in vars(linear)


def test_a_wide_model_decodes_like_full_passes() -> None:
    """The model is wide enough that its layers are packed. Greedy tokens are equal up to ties, and there are none here."""
    model = tiny_palm(num_tokens=300, dim=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)
    (result,) = generate(model, [[5, 6, 7]], GenerationConfig(max_new_tokens=10, temperature=0))
    row: Tensor = torch.tensor([[5, 6, 7]])
    for _ in range(10):
        with torch.no_grad():
            row = torch.cat([row, model(row)[:, -1:].argmax(-1)], dim=1)
    assert result[0].tokens == row[0, 3:].tolist() and VOCABULARY < 300
