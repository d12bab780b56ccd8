"""Tests of augments with their own tokenizers: conversion against an independent slow version, causality, and decoding."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.calm.alignment import Alignment
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment
from lightning_align.calm.text import OwnTokenizer
from lightning_align.data.tokenizer import Tokenizer, all_ends
from lightning_align.generation.sampler import GenerationConfig, generate
from tests.calm.toys import SMALL, connect
from tests.data.test_text_reader import TEXTS, make, slow_ends
from tests.toys import gap, tiny_palm

PAIRS = [
    ("bytes", "byte level"),
    ("bytes", "words"),
    ("byte level", "bytes"),
    ("byte level", "sentencepiece"),
    ("sentencepiece", "byte level"),
    ("unigram", "word pieces"),
    ("byte level without words", "unigram"),
    ("suffixes", "byte level"),
]
WORDS = " ".join(TEXTS).split()


@pytest.fixture(params=PAIRS, ids=lambda pair: " to ".join(pair))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Tokenizer]:
    first, second = request.param
    return make(first, tmp_path), make(second, tmp_path)


def ids_of(tokenizer: Tokenizer, text: str, *, ended: bool) -> list[int]:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*bos, *tokenizer.encode_batch([text])[0].ids, *([tokenizer.eos_id] if ended else [])]


def sentence(choose: random.Random, words: int) -> str:
    return " ".join(choose.choice(WORDS) for _ in range(words))


def slow_reading(tokenizer: Tokenizer, other: Tokenizer, ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Encode the whole text of a prompt, and decode each prefix of the row. It takes quadratic time."""
    text, anchor_ends = tokenizer.decode(ids), slow_ends(tokenizer, ids)
    (encoding,) = other.encode_batch([text])
    other_ids, ends = list(encoding.ids), [end for _, end in encoding.offsets]
    if other.bos_id is not None:
        other_ids, ends = [other.bos_id, *other_ids], [0, *ends]
    if ids[-1] in all_ends(tokenizer):
        anchor_ends[-1] = len(text) + 1
        other_ids, ends = [*other_ids, other.eos_id], [*ends, len(text) + 1]
    return other_ids, ends, anchor_ends


def test_prompts_are_read_as_their_whole_text_is_encoded(pair: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer, other = pair
    own, choose = OwnTokenizer(tokenizer, other), random.Random(1)
    for number in range(20):
        ids = ids_of(tokenizer, sentence(choose, 1 + number), ended=number % 2 == 0)
        ids[len(ids) // 2 : len(ids) // 2] = [tokenizer.pad_id] * (number % 3)  # special tokens say nothing
        reading = own.read(ids, num_prompt=len(ids))
        assert (reading.ids, reading.ends, reading.anchor_ends) == slow_reading(tokenizer, other, ids)
        # No token is visible before its characters, and all are at the end of the prompt.
        assert reading.columns == sorted(reading.columns)
        assert all(reading.anchor_ends[column] >= end for column, end in zip(reading.columns, reading.ends, strict=True))
        assert reading.columns[-1] == len(ids) - 1


def test_responses_are_read_as_far_as_the_anchor_has_written(pair: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer, other = pair
    own, choose = OwnTokenizer(tokenizer, other), random.Random(2)
    for _ in range(10):
        ids = ids_of(tokenizer, sentence(choose, 12), ended=True)
        reading = own.read(ids, num_prompt=3)
        text, anchor_ends = tokenizer.decode(ids), slow_ends(tokenizer, ids)
        seen = 0
        for column in range(3, len(ids) - 1):
            read = [end for end, at in zip(reading.ends, reading.columns, strict=True) if at <= column]
            seen = max([seen, *read])
            behind = text[seen : anchor_ends[column]]
            # Single letters wait for the next space, at most 16.
            assert seen <= anchor_ends[column]
            assert len(behind) < 16
            token = text[anchor_ends[column - 1] : anchor_ends[column]].strip()
            assert len(token) < 2 or seen == anchor_ends[column]


def test_later_tokens_change_nothing_before(pair: tuple[Tokenizer, Tokenizer]) -> None:
    """Change or cut the tokens from a column on: what earlier columns see stays as it was, also with the end of the text."""
    tokenizer, other = pair
    own, choose = OwnTokenizer(tokenizer, other), random.Random(3)
    frequent = [token for text in TEXTS for token in tokenizer.encode_batch([text])[0].ids]
    for _ in range(60):
        ids = ids_of(tokenizer, sentence(choose, 6), ended=True)
        place = choose.randrange(1, len(ids))
        tail = choose.choice([[], [tokenizer.eos_id], choose.choices(frequent, k=5)])
        num_prompt = choose.choice([0, min(3, place)])
        seen = []
        for row in (ids, [*ids[:place], *tail]):
            reading = own.read(row, num_prompt=num_prompt)
            seen.append([one for one in zip(reading.ids, reading.ends, reading.columns, strict=True) if one[2] < place])
        assert seen[0] == seen[1]


def composition(pair: tuple[Tokenizer, Tokenizer], *, double: bool = True, **options: Any) -> CALM:
    tokenizer, other = pair
    dtype = torch.float64 if double else torch.float32
    anchor = tiny_palm(num_tokens=tokenizer.vocab_size, dtype=dtype)
    augment = tiny_palm(num_tokens=other.vocab_size, dtype=dtype, seed=1)
    model = connect(CALM(anchor, Augment(augment, tokens="own", num_connections=2, **options), connection=SMALL))
    model.alignment = Alignment(tokenizer, [other])
    return model


def test_logits_depend_on_no_later_token(pair: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer, _ = pair
    model, choose = composition(pair), random.Random(4)
    for _ in range(4):
        ids = torch.tensor([ids_of(tokenizer, sentence(choose, 5), ended=True)])
        place = choose.randrange(2, ids.shape[1])
        changed = ids.clone()
        changed[0, place:] = torch.randint(4, tokenizer.vocab_size, (ids.shape[1] - place,))
        # Not bit for bit, because the augment gets another number of tokens.
        assert gap(model(ids)[:, :place], model(changed)[:, :place]) < 1e-9


@pytest.mark.parametrize("capacity", [64, 1])
def test_decoding_with_a_cache_gives_the_same_tokens(
    pair: tuple[Tokenizer, Tokenizer], capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different lengths that end at different steps, with a cache that is made anew several times."""
    monkeypatch.setattr("lightning_align.calm.own_cache._ROOM", capacity)
    tokenizer, _ = pair
    model, choose = composition(pair), random.Random(5)
    prompts = [ids_of(tokenizer, sentence(choose, words), ended=False) for words in (1, 4, 9)]
    config = GenerationConfig(max_new_tokens=14, temperature=0, num_samples=2)
    assert model.make_cache is not None
    limits = [14, 3, 9]
    cached = generate(model, prompts, config, limits=limits)
    for prompt, limit, found in zip(prompts, limits, cached, strict=True):
        tokens = torch.tensor([prompt])
        for _ in range(limit):
            inputs = model.alignment.inputs(tokens, num_prompts=[len(prompt)])  # type: ignore[union-attr]
            best = model(tokens, inputs=inputs)[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat((tokens, best), dim=1)
        assert [one.tokens for one in found] == [tokens[0, len(prompt) :].tolist()] * 2


def test_logits_with_a_cache_are_those_of_one_pass(pair: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer, _ = pair
    model = composition(pair)
    rows = [ids_of(tokenizer, text, ended=False)[:12] for text in ("The cat sat on the mat, and the dog", "Größe, naïve 東京")]
    cut = [7, 4]
    steps = min(len(row) - start for row, start in zip(rows, cut, strict=True))
    width = max(cut)
    starts = torch.tensor([width - start for start in cut])[:, None]
    columns = torch.arange(width + steps)
    exists, positions = columns >= starts, (columns - starts).clamp(min=0)
    padded = torch.tensor([[0] * (width - start) + row[: start + steps] for row, start in zip(rows, cut, strict=True)])
    assert model.make_cache is not None
    cache = model.make_cache(2, width + steps)
    found = []
    for start, stop in [(0, width), *((column, column + 1) for column in range(width, width + steps))]:
        now = slice(start, stop)
        found.append(model(padded[:, now], mask=exists[:, :stop], positions=positions[:, now], cache=cache)[:, -1])
    for index, (row, start) in enumerate(zip(rows, cut, strict=True)):
        tokens = torch.tensor([row[: start + steps]])
        whole = model(tokens, inputs=model.alignment.inputs(tokens, num_prompts=[start]))  # type: ignore[union-attr]
        assert gap(torch.stack(found)[:, index], whole[0, start - 1 :]) < 1e-9


def test_rows_may_be_padded_on_the_left(pair: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer, _ = pair
    model = composition(pair)
    row = ids_of(tokenizer, "The cat sat on the mat", ended=True)
    alone = model(torch.tensor([row]))
    mask = torch.arange(len(row) + 3)[None] >= 3
    padded = model(torch.tensor([[0, 0, 0, *row]]), mask=mask, positions=(torch.arange(len(row) + 3) - 3).clamp(min=0))
    assert gap(padded[:, 3:], alone) < 1e-9
