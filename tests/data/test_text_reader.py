"""Tests of reading ids one by one: after each id, the reader has the characters that decoding all ids gives."""

import json
import random
from copy import copy
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lightning_align.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from lightning_align.data.tokenizer.pieces import PieceEncoder
from lightning_align.data.tokenizer.reader import UNKNOWN, _Decoding, text_reader

TEXTS = [
    "The cat sat on the mat, and the dog didn't.",
    "  def f(x):\n        return x  # twice\n\n\n",
    "Größe, naïve café; 東京タワー 🙂🙂 e\u0301 \u200b",
    "3.14159 + 2,718 = 5?? (yes!)",
    "",
    " ",
    "नमस्ते दुनिया",
]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
KINDS = ["bytes", "byte level", "byte level without words", "sentencepiece", "unigram", "words", "word pieces", "suffixes"]


def make(kind: str, folder: Path) -> Tokenizer:
    """Train a small tokenizer of a kind on the texts."""
    if kind == "bytes":
        return ByteTokenizer()
    options = {"special_tokens": SPECIALS, "show_progress": False}
    trainer: object
    if kind.startswith("byte level"):
        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="without" not in kind)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "sentencepiece":
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        vocabulary = {
            token: i for i, token in enumerate([*SPECIALS, *fallback, "▁", *"abcdefghijklmnoprstuxyzTy.,", "▁t", "▁th"])
        }
        merges = [("▁", "t"), ("▁t", "h")]
        model = Model(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        model.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        model.add_special_tokens(SPECIALS)
        trainer = None
    elif kind == "unigram":
        model = Model(models.Unigram())
        model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **options)
    elif kind == "words":
        model = Model(models.WordLevel(unk_token="<unk>"))
        model.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=60, **options)
    elif kind == "word pieces":
        model = Model(models.WordPiece(unk_token="<unk>"))
        model.pre_tokenizer, model.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=150, **options)
    else:
        model = Model(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        model.pre_tokenizer, model.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
        trainer = trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="</w>", **options)
    if trainer is not None:
        model.train_from_iterator(TEXTS, trainer)
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(json.loads(model.to_str())))
    return load_tokenizer(str(path))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make(request.param, tmp_path_factory.mktemp("tokenizers"))


def slow_ends(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """For each id, decode all ids up to it."""
    ends: list[int] = []
    for count in range(1, len(ids) + 1):
        complete = tokenizer.decode(ids[:count]).rstrip(UNKNOWN)
        ends.append(max(len(complete), ends[-1] if ends else 0))
    return ends


def check(tokenizer: Tokenizer, ids: list[int]) -> None:
    reader, text, ends = text_reader(tokenizer), "", []
    for token in ids:
        text += reader.feed(token)
        ends.append(reader.num_characters)
    assert ends == slow_ends(tokenizer, ids), ids
    assert len(text + reader.finish()) == len(tokenizer.decode(ids)), ids


def test_texts(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode_batch([text])[0].ids
        check(tokenizer, ids)
        reader = text_reader(tokenizer)
        read = "".join(reader.feed(token) for token in ids)
        assert read + reader.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [kind for kind in KINDS if kind != "suffixes"], indirect=True)
def test_random_ids(tokenizer: Tokenizer) -> None:
    """Any ids in any order, such as characters whose bytes are not complete, and special tokens between others."""
    choose = random.Random(0)
    frequent = [token for text in TEXTS for token in tokenizer.encode_batch([text])[0].ids]
    for _ in range(150):
        drawn = [
            choose.choice(frequent) if choose.random() < 0.7 else choose.randrange(tokenizer.vocab_size) for _ in range(12)
        ]
        check(tokenizer, drawn)


def test_only_odd_tokenizers_are_decoded(tmp_path: Path) -> None:
    decoded = [kind for kind in KINDS if isinstance(text_reader(make(kind, tmp_path)), _Decoding)]
    assert decoded == ["suffixes"], "the last word of a text is written without the space that follows it elsewhere"


def test_copies_are_independent(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_batch(["é é the cat"])[0].ids
    reader = text_reader(tokenizer)
    reader.feed(ids[0])
    other = copy(reader)
    for token in ids[1:]:
        reader.feed(token)
    count = other.num_characters
    assert count == slow_ends(tokenizer, ids[:1])[0]
    for token in ids[1:]:
        other.feed(token)
    assert other.num_characters == reader.num_characters


@pytest.mark.parametrize("tokenizer", [kind for kind in KINDS if "without words" not in kind], indirect=True)
def test_pieces_give_the_ids_of_the_text(tokenizer: Tokenizer) -> None:
    """Tokenizers that split at spaces encode the words of a text as they encode the text."""
    encoder = PieceEncoder(tokenizer)
    for text in ("the cat sat on the mat", "Größe 東京 é, don't"):
        words = [word if number == 0 else f" {word}" for number, word in enumerate(text.split(" "))]
        parts = encoder.encode([(number == 0, word) for number, word in enumerate(words)])
        (whole,) = tokenizer.encode_batch([text])
        assert [token for ids, _ in parts for token in ids] == whole.ids
        starts = [sum(map(len, words[:number])) for number in range(len(words))]
        ends = [start + end for start, (_, ends) in zip(starts, parts, strict=True) for end in ends]
        assert ends == [end for _, end in whole.offsets]
