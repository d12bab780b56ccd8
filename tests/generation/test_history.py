"""Repetition penalty and no-repeat n-grams, compared with transformers and with a slow version in float64."""

from itertools import pairwise

import pytest
import torch

from lightning_align.generation.history import History, forbid_ngrams, penalize_repetition
from lightning_align.generation.sampler import GenerationConfig, generate
from tests.toys import Plain, tiny_palm

PROMPTS = [[3, 1, 4, 1], [1], [2, 7, 1, 8, 2, 7]]


def slow(logits: torch.Tensor, row: list[int], *, penalty: float, size: int) -> torch.Tensor:
    out = logits.double().clone()
    for token in set(row):
        out[token] = out[token] * penalty if out[token] < 0 else out[token] / penalty
    if size:
        last = row[len(row) - size + 1 :] if size > 1 else []
        for start in range(len(row) - size + 1):
            if len(row) >= size - 1 and row[start : start + size - 1] == last:
                out[row[start + size - 1]] = -torch.inf
    return out


@pytest.mark.parametrize(("penalty", "size"), [(1.3, 0), (0.8, 0), (1.0, 1), (1.0, 2), (1.0, 3), (1.0, 9), (1.5, 2)])
def test_each_step_equals_a_slow_version_and_transformers(penalty: float, size: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    generator = torch.Generator().manual_seed(0)
    settings = GenerationConfig(repetition_penalty=penalty, no_repeat_ngram_size=size)
    history = History(PROMPTS, room=30, copies=2, device=torch.device("cpu"), settings=settings)
    rows = [list(prompt) for prompt in PROMPTS for _ in range(2)]
    theirs = []
    if penalty != 1:
        theirs.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    if size:
        theirs.append(transformers.NoRepeatNGramLogitsProcessor(size))
    removed = 0
    for step in range(30):
        if step == 12:
            keep = torch.tensor([0, 3, 5])
            history.select(keep)
            rows = [rows[index] for index in keep]
        logits = torch.randn(len(rows), 9, generator=generator)
        before = logits.clone()
        found = history.filtered(logits)
        assert torch.equal(logits, before)
        for row, given, own in zip(rows, logits, found, strict=True):
            torch.testing.assert_close(own.double(), slow(given, row, penalty=penalty, size=size), rtol=1e-6, atol=1e-6)
            other = transformers.LogitsProcessorList(theirs)(torch.tensor([row]), given[None].clone())[0]
            torch.testing.assert_close(own, other, rtol=0, atol=0)
        removed += int(found.isinf().sum())
        tokens = torch.randint(0, 9, (len(rows),), generator=generator)
        history.append(tokens)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
    assert (removed > 0) == (size in (1, 2, 3))


def test_the_penalty_by_hand() -> None:
    tokens, exists = torch.tensor([[1, 1, 2, 0]]), torch.tensor([[True, True, True, False]])
    out = penalize_repetition(torch.tensor([[4.0, 4.0, -4.0]]), tokens, exists, penalty=2.0)
    assert out.tolist() == [[4.0, 2.0, -8.0]]  # token 0 is padding, and token 1 is penalized once


def test_ngrams_by_hand() -> None:
    # 5 6 7 5 6: behind (5 6), 7 would repeat the trigram. Behind (6), 7 would repeat the bigram.
    tokens, exists = torch.tensor([[5, 6, 7, 5, 6, 0]]), torch.tensor([[True] * 5 + [False]])
    for size, expected in ((3, [7]), (2, [7]), (4, []), (1, [5, 6, 7])):
        out = forbid_ngrams(torch.zeros(1, 9), tokens, exists, size=size)
        assert out.isinf()[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("plain", [False, True])
def test_no_ngram_of_a_response_occurs_twice(plain: bool) -> None:
    model = tiny_palm()
    config = GenerationConfig(max_new_tokens=40, temperature=0.3, no_repeat_ngram_size=2, num_samples=3, batch_size=2)
    for prompt, rows in zip(PROMPTS, generate(Plain(model) if plain else model, PROMPTS, config), strict=True):
        for row in rows:
            text = prompt + row.tokens
            grams = list(pairwise(text))
            new = grams[len(prompt) - 1 :]
            assert all(gram not in grams[: len(prompt) - 1 + place] for place, gram in enumerate(new))


def test_greedy_decoding_equals_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from lightning_align.models.pretrained import PretrainedLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": [7, 9]}
    model = PretrainedLM(config={"model_type": "llama", **sizes, **heads, "initializer_range": 0.5})
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    ours = generate(model, PROMPTS, GenerationConfig(max_new_tokens=25, temperature=0, **options), eos_id=7)
    for prompt, (response,) in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        settings = transformers.GenerationConfig(
            max_new_tokens=25, do_sample=False, eos_token_id=[7, 9], pad_token_id=0, bos_token_id=1, **options
        )
        theirs = model.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        end = [] if response.end is None else [response.end]
        assert prompt + response.tokens + end == theirs[0].tolist()
