"""The common beginning of prompts is read once, and the responses are those of prompts that are read whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.generation import prefix
from lightning_align.generation.prefix import read_prefix
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.generation.static import StaticDecoder
from lightning_align.models import pretrained_cache
from lightning_align.models.attention import KVCache
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.pretrained_cache import continuation_fault
from tests.generation.test_continuous import FAMILIES, MODELS, check_equal, lively
from tests.models.families import TEXT, build
from tests.models.test_families import WITHOUT_CACHE
from tests.toys import VOCABULARY, tiny_palm

CPU = torch.device("cpu")
EOS = 5


def prompts(common: int = 10, count: int = 9) -> list[list[int]]:
    """Prompts with a common beginning. The rests of some are longer than the whole prompt of others."""
    generator = torch.Generator().manual_seed(4)
    lengths = [1, 15, 2, 1, 7, 3, 14, 5, 4][:count]
    start, *rests = (torch.randint(6, VOCABULARY, (n,), generator=generator).tolist() for n in (common, *lengths))
    return [[*start, *rest] for rest in rests]


def read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "LEAST", 10**9)


@pytest.mark.parametrize("settings", [{}, {"num_samples": 2, "batch_size": 2}, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "plain"])
def test_responses_are_those_of_whole_prompts(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where rounding does not change which token is drawn. Two models have windows shorter than the prefix."""
    model, rows = MODELS[name](), prompts()
    config = GenerationConfig(**{"max_new_tokens": 9, "batch_size": 4, "seed": 3, **settings})
    limits = [1 + (7 * i) % 12 for i in range(len(rows))]
    found = generate(model, rows, config, eos_id=EOS, limits=limits)
    read_whole(monkeypatch)
    check_equal(found, generate(model, rows, config, eos_id=EOS, limits=limits))


@pytest.mark.parametrize("family", [name for name in TEXT if name not in WITHOUT_CACHE])
def test_every_family_continues_a_prefix(family: str) -> None:
    assert continuation_fault(build(family)) is None


@pytest.mark.parametrize("name", ["palm", "llama", "gpt2", "mixture"])
def test_the_decoder_of_a_gpu_continues_a_prefix(name: str) -> None:
    model, rows = MODELS[name]().eval(), prompts()
    with torch.no_grad():
        start = read_prefix(model, rows, CPU)
        assert start is not None
        decoders = [
            StaticDecoder(model, rows[:4], limit=20, copies=2, device=CPU, prefix=given)  # type: ignore[arg-type]
            for given in (None, start)
        ]
        whole, continued = ([decoder.start(2)] for decoder in decoders)
        tokens = torch.arange(8) + 6
        for decoder, seen in zip(decoders, (whole, continued), strict=True):
            seen.append(decoder.step(tokens).clone())
            seen.append(decoder.join(rows[4:], limit=5, copies=2))
            seen.append(decoder.step(torch.arange(18) % 5 + 6).clone())
    for one, two in zip(whole, continued, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)


def test_the_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_palm(), prompts(common=30)
    seen: list[tuple[int, int]] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, **k: seen.append(tuple(tokens.shape)) or hidden(tokens, **k))
    generate(model, rows, GenerationConfig(max_new_tokens=2, batch_size=4, num_samples=2), continuous=False)
    assert seen[0] == (1, 30)
    assert max(rows * columns for rows, columns in seen[1:]) == 4 * 14  # the rests of the second batch, without a prefix
    seen.clear()
    read_whole(monkeypatch)
    generate(model, rows, GenerationConfig(max_new_tokens=2, batch_size=4, num_samples=2), continuous=False)
    assert max(rows * columns for rows, columns in seen) == 4 * 44


TEN = [*range(3, 13)]


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([TEN, TEN], 9),  # a token has to be left
        ([TEN, [*TEN, *TEN]], 9),
        ([TEN, [*TEN[:8], 2, 2]], 8),
        ([TEN, [*TEN[:7], 2, 2]], None),
        ([TEN], None),
        ([TEN, [2, *TEN[1:]]], None),
    ],
    ids=["equal", "nested", "least", "few", "one", "none"],
)
def test_what_counts_as_a_prefix(rows: list[list[int]], length: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_palm(dtype=torch.float64)
    with torch.no_grad():
        found = read_prefix(model, rows, CPU)
    assert (None if found is None else len(found.tokens)) == length
    config = GenerationConfig(max_new_tokens=4, seed=2)
    answers = generate(model, rows, config)
    read_whole(monkeypatch)
    check_equal(answers, generate(model, rows, config))


def test_a_repeated_cache_is_shifted() -> None:
    keys = torch.tensor([[1.0, 2.0, 3.0, torch.nan]])[:, :, None]
    new = KVCache([keys], [-keys], length=3).repeat(torch.tensor([0, 2]), capacity=5)
    assert (new.length, new.capacity) == (3, 5)
    assert new.keys[0][:, :3, 0].tolist() == [[1, 2, 3], [1, 1, 1]]  # the first two columns of the second row are masked
    assert new.values[0][0, :3, 0].tolist() == [-1, -2, -3]


def test_a_model_that_cannot_continue_reads_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(PretrainedLM(config=FAMILIES["llama"]))
    assert isinstance(model, PretrainedLM)
    monkeypatch.setattr(pretrained_cache, "_faults", type(pretrained_cache._faults)())
    hidden = model.hidden

    def forgetful(tokens: Tensor, *, cache: Any = None, positions: Tensor | None = None, **options: Any) -> Tensor:
        if cache is not None and cache.length and tokens.shape[1] > 1:
            positions = torch.zeros_like(tokens)
        return hidden(tokens, cache=cache, positions=positions, **options)

    monkeypatch.setattr(model, "hidden", forgetful)
    fault = continuation_fault(model)
    assert fault is not None and "standard deviation" in fault
    with torch.no_grad():
        assert read_prefix(model, prompts(), CPU) is None
