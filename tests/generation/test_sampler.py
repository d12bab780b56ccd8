"""The sampler compared with a slow decoder: one row, one token and one full forward pass at a time."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.runtime.modes import evaluating
from tests.toys import VOCABULARY, Plain, tiny_palm

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8], [2, 8]]


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], steps: int) -> list[int]:
    row = list(prompt)
    for _ in range(steps):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"variant": "paper"}, {"qk_rmsnorm": True}])
def test_greedy_is_the_argmax_of_full_passes(overrides: dict[str, object], plain: bool, batch_size: int) -> None:
    model: nn.Module = tiny_palm(**overrides)
    expected = [[Generation(greedy(model, prompt, 12), False)] for prompt in PROMPTS]
    if plain:
        model = Plain(model)
    config = GenerationConfig(max_new_tokens=12, temperature=0, batch_size=batch_size)
    assert generate(model, PROMPTS, config) == expected
    assert len({token for (row,) in expected for token in row.tokens}) > 5  # not one token over and over


def test_equal_lengths_need_no_mask() -> None:
    model, prompts = tiny_palm(), [[3, 1], [2, 5]]
    config = GenerationConfig(max_new_tokens=12, temperature=0)
    assert generate(model, prompts, config) == [[Generation(greedy(model, p, 12), False)] for p in prompts]


@pytest.mark.parametrize("plain", [False, True])
def test_a_response_ends_before_its_end_token(plain: bool) -> None:
    model = tiny_palm()
    full = [greedy(model, prompt, 20) for prompt in PROMPTS]
    eos_id = full[0][4]
    results = generate(Plain(model) if plain else model, PROMPTS, GenerationConfig(20, temperature=0), eos_id=eos_id)
    for row, (result,) in zip(full, results, strict=True):
        ends = eos_id in row
        assert result == Generation(row[: row.index(eos_id)] if ends else row, ends)
    assert any(result.finished for (result,) in results)
    assert results[0][0].finished


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    model = tiny_palm()
    expected = greedy(model, [3, 22, 4], 6)
    assert 22 not in expected
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    assert generate(model, [[3, 22, 4]], config, eos_id=22) == [[Generation(expected, False)]]


class Clock(nn.Module):
    """Predicts token + 1, so the last token of the prompt sets the number of steps until the end. Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.one_hot((tokens + 1).clamp(max=49), 50) * 9.0 + self.weight


def test_decoding_stops_once_all_rows_have_ended() -> None:
    model = Clock()
    results = generate(model, [[45], [40], [48, 47]], GenerationConfig(1000, temperature=0), eos_id=49)
    assert [r.tokens for (r,) in results] == [[46, 47, 48], list(range(41, 49)), [48]]
    assert model.calls < 30
    (limited,) = generate(model, [[10]], GenerationConfig(5, temperature=0), eos_id=49)
    assert limited == [Generation([11, 12, 13, 14, 15], False)]
    # The limit counts the end-of-sequence token.
    assert generate(model, [[45]], GenerationConfig(4, temperature=0), eos_id=49) == [[Generation([46, 47, 48], True)]]
    assert generate(model, [[45]], GenerationConfig(3, temperature=0), eos_id=49) == [[Generation([46, 47, 48], False)]]


@pytest.mark.parametrize("plain", [False, True])
def test_sample_frequencies_match_the_model(plain: bool) -> None:
    """Compares the first two tokens of 4,000 samples with the product of probabilities, with a fixed seed."""
    torch.manual_seed(2)
    model = tiny_palm(num_tokens=3, seed=3)
    config = GenerationConfig(max_new_tokens=2, num_samples=4000, temperature=1.7, seed=5)
    (results,) = generate(Plain(model) if plain else model, [[1, 2, 0]], config)
    with torch.no_grad():
        first = (model(torch.tensor([[1, 2, 0]]))[0, -1] / 1.7).softmax(0)
        second = [(model(torch.tensor([[1, 2, 0, a]]))[0, -1] / 1.7).softmax(0) for a in range(3)]
    expected = {(a, b): 4000 * float(first[a] * second[a][b]) for a in range(3) for b in range(3)}
    counts = {pair: sum(tuple(r.tokens) == pair for r in results) for pair in expected}
    chi = sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in expected)
    assert chi < 26.1  # 8 degrees of freedom, once in 1,000


def test_samples_repeat_with_their_seed_and_leave_the_global_generator_alone() -> None:
    model, state = tiny_palm(), torch.get_rng_state()
    config = GenerationConfig(max_new_tokens=8, num_samples=3, seed=1)
    first = generate(model, PROMPTS, config)
    assert generate(model, PROMPTS, config) == first
    assert generate(model, PROMPTS, GenerationConfig(max_new_tokens=8, num_samples=3, seed=2)) != first
    assert generate(model, PROMPTS, config, iteration=1) != first
    assert all(len(row) == 3 and len({tuple(r.tokens) for r in row}) > 1 for row in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_submodule_returns_to_its_own_mode() -> None:
    model = tiny_palm(ff_dropout=0.5).train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    generate(model, PROMPTS, GenerationConfig(max_new_tokens=4, temperature=0))
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_dropout_is_off() -> None:
    model, config = tiny_palm(ff_dropout=0.9), GenerationConfig(max_new_tokens=8, temperature=0)
    assert generate(model.train(), PROMPTS, config) == generate(model.eval(), PROMPTS, config)


def test_training_works_after_generating() -> None:
    model = tiny_palm()
    generate(model, PROMPTS, GenerationConfig(max_new_tokens=4))
    model(torch.tensor([[1, 2]])).sum().backward()


def test_the_cache_works_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        (result,) = generate(tiny_palm(), [[1, 2, 3]], GenerationConfig(max_new_tokens=5, temperature=0))
    assert len(result[0].tokens) == 5 and max(result[0].tokens) < VOCABULARY


def test_no_prompts_give_no_responses() -> None:
    assert generate(tiny_palm(), []) == []


def test_an_empty_prompt_raises() -> None:
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        generate(tiny_palm(), [[1], []])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` of GenerationConfig must be at least 1, but got 0"),
        ({"temperature": -1.0}, "`temperature` .* must be 0 .greedy. or above, but got -1.0"),
        ({"top_k": 0}, "`top_k` .*got 0"),
        ({"top_p": 0.0}, "`top_p` .*got 0.0"),
        ({"top_p": 1.1}, "`top_p` .*got 1.1"),
        ({"min_p": 1.0}, "`min_p` .*got 1.0"),
        ({"typical_p": 0.0}, "`typical_p` .*got 0.0"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` .*got 0.0"),
        ({"no_repeat_ngram_size": -1}, "`no_repeat_ngram_size` .*got -1"),
        ({"num_samples": 0}, "`num_samples` .*got 0"),
        ({"batch_size": 0}, "`batch_size` .*got 0"),
    ],
)
def test_invalid_values_raise(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**values)


def test_records_of_settings_that_the_first_version_had_are_as_it_wrote_them() -> None:
    first = {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "num_samples", "batch_size", "seed", "stop"}
    assert GenerationConfig(stop="x").recorded() == {name: getattr(GenerationConfig(stop=["x"]), name) for name in first}
    for name, value in (("eos_token", [3]), ("typical_p", 0.9), ("repetition_penalty", 1.1), ("no_repeat_ngram_size", 2)):
        assert GenerationConfig(**{name: value}).recorded() == {**GenerationConfig().recorded(), name: value}
    assert GenerationConfig(**GenerationConfig(top_k=3).recorded()) == GenerationConfig(top_k=3)
