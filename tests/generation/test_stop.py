"""Stop texts under all cuts into tokens, compared with a slow search in the whole text."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models

from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.data.tokenizer.file import FileTokenizer
from lightning_align.generation.stop import StopTexts


def metaspace(path, words: list[str]) -> FileTokenizer:
    """A tokenizer of whole words whose decoder drops the space of the first one, as those of SentencePiece do."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<turn>", *words])}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    model.decoder = decoders.Metaspace()
    model.add_special_tokens(["<s>", "</s>", "<turn>"])
    model.save(str(path / "tokenizer.json"))
    return FileTokenizer(str(path / "tokenizer.json"), eos="</s>")


def llama(path) -> FileTokenizer:
    """A decoder as that of Llama 2: spaces are marks, the first one is dropped, and rare characters are bytes."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", "▁b", "ab", "。", "▁。"]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    model.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(parts)
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.save(str(path / "tokenizer.json"))
    return FileTokenizer(str(path / "tokenizer.json"))


def test_bytes_and_spaces_of_a_sentencepiece_vocabulary(tmp_path) -> None:
    """The slow version joins the bytes of the tokens. A text is complete with the token that brings its last byte."""
    generator, tokenizer = random.Random(1), llama(tmp_path)
    characters = "a b。é👍\n"
    written = tokenizer.encode_batch(["é"])[0].ids
    assert len(written) == 2  # by bytes
    found = 0
    for _ in range(200):
        text = "a" + "".join(generator.choice(characters) for _ in range(generator.randrange(25)))
        ids: list[int] = []
        for character in text:
            whole = tokenizer.token_id(character.replace(" ", "▁"))
            spelled = [3 + byte for byte in character.encode()]
            ids += spelled if whole is None or generator.random() < 0.4 else [whole]
        texts = ["".join(generator.choice(characters) for _ in range(generator.randrange(1, 4))) for _ in range(2)]
        stop = StopTexts.of(texts, tokenizer, ends=[2])
        said = [bytes([i - 3]) if i < 259 else tokenizer.decode([ids[0], i])[1:].encode() for i in ids]
        whole_bytes = [b"".join(said[:n]) for n in range(len(ids) + 1)]
        expected = next((n for n in range(1, len(ids) + 1) if any(t.encode() in whole_bytes[n] for t in texts)), None)
        assert first_stop(stop, ids) == expected, (text, texts)
        found += expected is not None
    assert found > 50


def first_stop(stop: StopTexts, tokens: list[int]) -> int | None:
    return next((n for n in range(1, len(tokens) + 1) if stop.reached(tokens[:n])), None)


@pytest.mark.parametrize("stop", ["。", "👍🏽", ".", "\n\nQ:", "é"])
def test_bytes_of_a_character_end_a_response_with_the_last_of_them(stop: str) -> None:
    tokenizer = ByteTokenizer()
    before, after = "ab。"[: 2 + (stop != "。")], "xyz"
    ids = tokenizer.encode_batch([before + stop + after])[0].ids
    stops = StopTexts.of([stop], tokenizer)
    assert first_stop(stops, ids) == len((before + stop).encode())
    assert first_stop(stops, tokenizer.encode_batch([before + after])[0].ids) is None


def test_random_cuts_end_where_the_whole_text_first_contains_a_stop_text(tmp_path) -> None:
    """The slow version reads all tokens as one text, without a window. The pieces are random cuts of few letters."""
    generator = random.Random(0)
    pieces = ["a", "b", "ab", "▁a", "▁b", "▁", "ba▁", "b▁a", "aab"]
    tokenizer = metaspace(tmp_path, pieces)
    found = 0
    for _ in range(300):
        tokens = [generator.randrange(2, 3 + len(pieces)) for _ in range(generator.randrange(1, 60))]
        texts = ["".join(generator.choice("ab ") for _ in range(generator.randrange(1, 7))) for _ in range(2)]
        stop = StopTexts(texts, tokenizer.decode, shown=lambda ids: tokenizer.decode(ids, skip_special=False))
        said = [["", "", "<turn>", *pieces][token].replace("▁", " ") for token in tokens]
        plain = ["" if piece == "<turn>" else piece for piece in said]
        expected = next(
            (n for n in range(1, len(tokens) + 1) if any(t in "".join(x[:n]) for t in texts for x in (said, plain))), None
        )
        anchored = any(any(c in piece for c in "ab") for piece in plain[:1])
        if anchored or not any(text.startswith(" ") for text in texts):
            # Before the first letter is said, a space that the decoder drops cannot be seen.
            assert first_stop(stop, tokens) == expected
            found += expected is not None
    assert found > 50


def test_a_space_in_front_of_the_first_token_is_read(tmp_path) -> None:
    tokenizer = metaspace(tmp_path, ["▁the", "▁end", "end", "x"])
    the, end, bare, x = range(3, 7)
    stop = StopTexts.of([" end"], tokenizer)
    assert first_stop(stop, [end, x]) == 1
    assert first_stop(stop, [x, the, end, x]) == 3
    assert first_stop(stop, [bare, x, bare]) is None


def test_special_tokens_match_by_their_text_and_are_nothing_between_others(tmp_path) -> None:
    tokenizer = metaspace(tmp_path, ["x", "now", "▁the"])
    turn, x, now, the = 2, 3, 4, 5
    assert first_stop(StopTexts.of(["<turn>"], tokenizer), [x, now, turn, x]) == 3
    assert first_stop(StopTexts.of(["x<turn>n"], tokenizer), [now, x, turn, now]) == 4
    # Far more special tokens than the text has bytes.
    assert first_stop(StopTexts.of(["xnow"], tokenizer), [the, x, *[turn] * 50, now]) == 53
    assert first_stop(StopTexts.of(["xnow"], tokenizer), [the, x, *[turn] * 50, the, now]) is None


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ("", "it is empty"),
        ("a\ufffd", r"U\+FFFD"),
        ("\ud83d", "half of a surrogate pair"),
        ("\n", "has no tokens that say it"),
        ("END", "has no tokens that say it"),
        ("</s>x", "behind an end-of-sequence token"),
    ],
)
def test_a_text_that_no_response_can_contain_is_refused(tmp_path, stop: str, reason: str) -> None:
    tokenizer = metaspace(tmp_path, ["x", "now", "▁the", "end"])
    with pytest.raises(ValueError, match=rf"`stop` of GenerationConfig must be texts .*{reason}"):
        StopTexts.of([stop], tokenizer, ends=[1])


@pytest.mark.parametrize("stop", ["END.", "ND. ", " AndEND.", "x", "</s>", "<turn>"])
def test_a_text_inside_or_across_tokens_is_accepted(tmp_path, stop: str) -> None:
    tokenizer = metaspace(tmp_path, ["END.▁And", "x", "▁"])
    assert StopTexts.of([stop], tokenizer, ends=[1]).texts == (stop,)
