"""Prompt lookup guesses tokens where a row repeats itself, and no response depends on it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.generation.decoder import _CachedDecoder
from lightning_align.generation.lookup import PromptLookup
from lightning_align.generation.sampler import GenerationConfig, generate
from tests.generation.test_continuous import EOS, MODELS, check_equal
from tests.toys import VOCABULARY


def prompts(count: int = 4) -> list[list[int]]:
    """Prompts in which a few tokens occur again and again."""
    generator = torch.Generator().manual_seed(8)
    parts = torch.randint(6, VOCABULARY, (count, 4), generator=generator).tolist()
    return [[*part, 6, *part, 7, *part[: 1 + row]] for row, part in enumerate(parts)]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0.5},
        {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 0.4, "batch_size": 2},
    ],
    ids=["greedy", "sampled", "filtered", "until one row is left"],
)
@pytest.mark.parametrize("name", MODELS)
def test_responses_are_those_without_guesses(name: str, settings: dict[str, Any]) -> None:
    """In float64, where rounding does not change which token is drawn."""
    model, rows = MODELS[name](), prompts()
    config = {"max_new_tokens": 30, "batch_size": 1, "seed": 3, **settings}
    expected = generate(model, rows, GenerationConfig(**config), eos_id=EOS)
    for most in (1, 4):
        check_equal(generate(model, rows, GenerationConfig(**config, prompt_lookup=most), eos_id=EOS), expected)


@pytest.mark.parametrize("name", ["palm", "llama"])
def test_guesses_save_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = MODELS[name]()
    passes, rewound = list[int](), list[int]()
    config = GenerationConfig(max_new_tokens=60, temperature=0, prompt_lookup=4)
    generate(model, prompts()[:1], config)  # with the probes of the first use
    hidden, rewind = model.hidden, _CachedDecoder.rewind

    def counted(tokens: Tensor, **given: Any) -> Tensor:
        passes.append(tokens.shape[1])
        states: Tensor = hidden(tokens, **given)
        return states

    def recorded(self: _CachedDecoder, count: int) -> None:
        rewound.append(count)
        rewind(self, count)

    monkeypatch.setattr(model, "hidden", counted)
    monkeypatch.setattr(_CachedDecoder, "rewind", recorded)
    ((response,),) = generate(model, prompts()[:1], config)
    assert len(response.tokens) == 60
    read = passes[1:]  # behind the prompt
    assert max(read) == 5  # one token and four guesses; fewer before the limit
    # All drawn tokens but the last one are read, in fewer passes.
    assert sum(read) - sum(rewound) == 59 and len(read) < 59


def test_a_guess_is_what_followed_last_by_hand() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 1, 2, 5, 9])
    assert lookup.guess(3) == []  # 5, 9 is new
    lookup.extend([1, 2])
    assert lookup.guess(3) == [5, 9, 1]  # after the last 1, 2
    assert lookup.guess(0) == []
    lookup.extend([3])
    assert lookup.guess(9) == [4, 1, 2, 5, 9, 1, 2, 3, 4]  # after 1, 2, 3, and again
    assert PromptLookup([4]).guess(2) == PromptLookup([]).guess(2) == []


def test_a_guess_is_what_a_slow_search_finds() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, (200,), generator=generator).tolist()
    lookup = PromptLookup([])
    for length in range(200):
        own = tokens[:length]
        found = next(
            (
                start + size
                for size in (3, 2)
                if length >= size
                for start in reversed(range(length - size))
                if own[start : start + size] == own[-size:]
            ),
            None,
        )
        if found is not None:
            for _ in range(4):
                own.append(own[found + len(own) - length])
        assert lookup.guess(4) == own[length:]
        lookup.extend(tokens[length : length + 1])


def test_other_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="`prompt_lookup` of GenerationConfig must be at least 0, but got -1"):
        GenerationConfig(prompt_lookup=-1)
