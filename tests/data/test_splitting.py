"""A prompt that is encoded in two parts has the ids of the whole, whatever follows it."""

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from lightning_align.data.tokenizer.splitting import _PATTERNS, last_split, splits_at_spaces
from tests.data.helpers import WORDS, small_bpe

PIECES = [
    *WORDS,
    *([" "] * 12),
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\x1f",
    "\xa0",
    "é",
    "東京",
    "🙂",
    "'ll",
    "don't",
    "1234",
    "<eos>",
    "...",
    "?",
]


def with_steps(model: tokenizers.Tokenizer, pattern: str) -> tokenizers.Tokenizer:
    """Give a tokenizer another pattern of words."""
    model = tokenizers.Tokenizer.from_str(model.to_str())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("number", range(1 + len(_PATTERNS)))
def test_the_ids_before_the_place_do_not_depend_on_what_follows(number: int, tmp_path: Path) -> None:
    model = small_bpe(tmp_path)._model
    if number:
        model = with_steps(model, _PATTERNS[number - 1])
    assert splits_at_spaces(model)
    numbers = random.Random(number)
    num_split = 0
    for _ in range(2000):
        text, more = ("".join(numbers.choices(PIECES, k=numbers.randint(0, 20))) for _ in range(2))
        place = last_split(text)
        num_split += place > 0
        head, tail, whole = (
            model.encode(t, add_special_tokens=False) for t in (text[:place], text[place:] + more, text + more)
        )
        assert head.ids + tail.ids == whole.ids
        assert head.offsets + [(start + place, end + place) for start, end in tail.offsets] == whole.offsets
    assert num_split > 1000


def test_the_last_place() -> None:
    assert last_split("the lazy dog") == 8
    assert last_split("the lazy  \n dog") == 8
    assert last_split("the") == last_split(" the") == last_split("") == last_split("é the") == 0


def test_other_tokenizers_are_not_split(tmp_path: Path) -> None:
    base = small_bpe(tmp_path)._model
    assert not splits_at_spaces(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    changes = {
        "normalizer": lambda model: setattr(model, "normalizer", normalizers.Lowercase()),
        "prefix": lambda model: setattr(model, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "no words": lambda model: setattr(
            model, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ),
        "space in a token": lambda model: model.add_tokens(["a b"]),
        "stripped": lambda model: model.add_tokens([AddedToken("<x>", lstrip=True)]),
        "single word": lambda model: model.add_tokens([AddedToken("<x>", single_word=True)]),
    }
    for name, change in changes.items():
        model = tokenizers.Tokenizer.from_str(base.to_str())
        assert splits_at_spaces(model)
        change(model)
        assert not splits_at_spaces(model), name
    assert not splits_at_spaces(with_steps(base, r"\S+"))
