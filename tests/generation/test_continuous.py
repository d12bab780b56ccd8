"""Prompts that start as soon as rows have ended, compared with batches that start when a whole batch has ended."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.generation.packing import packed_linears
from lightning_align.generation.sampler import Generation, GenerationConfig, generate, generate_parts
from lightning_align.models.attention import KVCache
from lightning_align.models.lora import LoRAConfig, add_lora, lora_parameters
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.spin.opponent import GeometricMixture
from tests.toys import VOCABULARY, Plain, tiny_palm

EOS = 5
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": 5},
    "gemma3": {
        "model_type": "gemma3_text",
        **SMALL,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
}


def prompts(count: int = 16) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(6, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def lively(model: nn.Module) -> nn.Module:
    """In float64, with weights so large that answers differ and end at different lengths."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model.double()


def mixture() -> nn.Module:
    return GeometricMixture(tiny_palm(dtype=torch.float64), tiny_palm(dtype=torch.float64, seed=1), 0.3)


def adapted() -> nn.Module:
    model = tiny_palm(dtype=torch.float64)
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in lora_parameters(model, "default"):
            parameter.normal_()
    return model


MODELS = {
    "palm": lambda: tiny_palm(dtype=torch.float64),
    "plain": lambda: Plain(tiny_palm(dtype=torch.float64)),
    "lora": adapted,
    "mixture": mixture,
    **{name: lambda config=config: lively(PretrainedLM(config=config)) for name, config in FAMILIES.items()},
}


def check_equal(one: list[list[Generation]], two: list[list[Generation]]) -> None:
    assert one == two
    for first, second in zip(one, two, strict=True):
        for a, b in zip(first, second, strict=True):
            assert (a.reason, a.end) == (b.reason, b.end)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)  # log-probs are float32


@pytest.mark.portable
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"num_samples": 3, "top_p": 0.9, "batch_size": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["sampled", "greedy", "samples", "history"],
)
@pytest.mark.parametrize("name", MODELS)
def test_responses_are_those_of_fixed_batches(name: str, settings: dict[str, Any]) -> None:
    """In float64, where the rounding of another batch does not change which token is drawn."""
    model, rows = MODELS[name](), prompts()
    config = GenerationConfig(**{"max_new_tokens": 20, "batch_size": 8, "temperature": 1.2, "seed": 3, **settings})
    limits = [1 + (7 * i) % 25 for i in range(len(rows))]
    fixed = generate(model, rows, config, eos_id=EOS, limits=limits, continuous=False)
    check_equal(generate(model, rows, config, eos_id=EOS, limits=limits), fixed)
    lengths = {len(answer.tokens) for row in fixed for answer in row}
    assert len(lengths) > 8, lengths  # otherwise rows do not end at different times
    alone = generate(model, rows[4:5], config, eos_id=EOS, ids=[4], limits=limits[4:5])
    check_equal(alone, fixed[4:5])


class Clock(nn.Module):
    """Predicts token + 1, so the last token of the prompt sets the number of steps until 49. Records the rows of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        assert not self.training
        self.calls.append(len(tokens))
        return nn.functional.one_hot((tokens + 1).clamp(max=49), 50) * 9.0 + self.weight


def test_the_next_prompt_takes_the_place_of_a_row_that_ended() -> None:
    model = Clock()
    config = GenerationConfig(100, temperature=0, batch_size=2)
    rows = [[9], [45], [45], [45], [45], [45], [45], [45]]
    answers = generate(model, rows, config, eos_id=49)
    assert [len(answer.tokens) for (answer,) in answers] == [39, *[3] * 7]
    # The long row takes 40 steps, and each short row ends at a check, after four. The next prompt is then read alone.
    assert model.calls.count(1) == 6 + 12 and model.calls.count(2) == 28
    model.calls.clear()
    assert generate(model, rows, config, eos_id=49, continuous=False) == answers
    assert len(model.calls) == 40 + 3 * 4


def test_each_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_palm(), prompts()
    seen: list[tuple[int, int]] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, **k: seen.append(tuple(tokens.shape)) or hidden(tokens, **k))
    config = GenerationConfig(max_new_tokens=12, batch_size=8, num_samples=2)
    generate(model, [[*row, 7] for row in rows], config, limits=[2 + i % 11 for i in range(len(rows))])
    assert sum(count for count, columns in seen if columns > 1) == len(rows)
    assert max(count for count, columns in seen if columns == 1) == 16


def test_parts_are_yielded_when_they_are_complete() -> None:
    model = Clock().train()
    rows = [[45], [45], [5], [45], [46], [46]]
    parts = [[0, 1], [2, 3], [4, 5]]
    config = GenerationConfig(100, temperature=0, batch_size=2)
    expected = generate(model, rows, config, eos_id=49, continuous=False)
    model.train()
    calls = []
    answered = {}
    for number, answers in generate_parts(model, rows, config, parts=parts, eos_id=49):
        assert model.training and torch.is_grad_enabled()
        calls.append((number, len(model.calls)))
        answered[number] = answers
    assert [number for number, _ in calls] == [0, 2, 1]  # the second part has the long row
    assert calls[1][1] < calls[2][1]
    assert {n: [expected[i] for i in part] for n, part in enumerate(parts)} == answered
    fixed = [number for number, _ in generate_parts(model, rows, config, parts=parts, eos_id=49, continuous=False)]
    assert fixed == [0, 1, 2]
    assert list(generate_parts(model, rows, config, parts=[], eos_id=49)) == []


def test_layers_are_packed_only_while_a_part_is_generated() -> None:
    model, rows = tiny_palm(dim=192, dtype=torch.float32), prompts(6)
    packed = [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() >= 2**15]
    with packed_linears(model):
        assert any("forward" in vars(m) for m in packed)  # so that this test can fail
    for _ in generate_parts(model, rows, GenerationConfig(9, batch_size=2), parts=[[0, 1], [2, 3], [4, 5]]):
        assert not any("forward" in vars(m) for m in packed)


def test_an_early_end_of_the_first_token_leaves_no_trace() -> None:
    """Rows whose first token ends them, in all places of a batch."""
    model = Clock()
    rows = [[48], [20], [48], [48], [30], [48], [48], [40], [48]]
    config = GenerationConfig(100, temperature=0, batch_size=3)
    answers = generate(model, rows, config, eos_id=49)
    assert [len(answer.tokens) for (answer,) in answers] == [48 - row[0] for row in rows]
    assert all(answer.reason == "eos" and answer.end == 49 for (answer,) in answers)
    nothing = generate(model, rows, config, eos_id=49, limits=[0, 3, 0, 1, 0, 1, 1, 0, 0])
    assert [len(answer.tokens) for (answer,) in nothing] == [0, 3, 0, 0, 0, 0, 0, 0, 0]


def test_joined_caches_end_at_the_same_column() -> None:
    def cache(values: list[list[float]], capacity: int) -> KVCache:
        filled = torch.tensor(values)[:, :, None]
        out = torch.full((len(values), capacity, 1), torch.nan)
        out[:, : filled.shape[1]] = filled
        return KVCache([out.clone()], [-out], length=filled.shape[1])

    old, new = cache([[9, 9, 1, 2], [9, 9, 9, 3]], 6), cache([[4, 5, 6]], 3)
    old.join(new, columns=3, capacity=5)
    assert old.length == 3 and old.capacity == 5
    assert old.keys[0][:, :3, 0].tolist() == [[9, 1, 2], [9, 9, 3], [4, 5, 6]]
    assert torch.equal(old.values[0][:, :3], -old.keys[0][:, :3])
    old.join(cache([[7, 8, 7, 8]], 4), columns=4, capacity=4)
    assert old.keys[0][:, :, 0].tolist() == [[0, 9, 1, 2], [0, 9, 9, 3], [0, 4, 5, 6], [7, 8, 7, 8]]
