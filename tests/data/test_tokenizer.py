import json
import pickle

import pytest
import tokenizers

from lightning_align.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    check_vocabulary,
    load_tokenizer,
    train_tokenizer,
)
from tests.data.helpers import small_bpe, write_jsonl

TEXTS = ["", "plain text 123", "  spaces \n\n lines", "über naïve 東京 🙂 e\u0301", "\x00\t\u2028"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    small_bpe(folder)
    return folder


def test_bytes_by_hand():
    (encoding,) = ByteTokenizer().encode_batch(["aé"])
    assert encoding.ids == [100, 198, 172]
    assert encoding.offsets == [(0, 1), (1, 2), (1, 2)]
    assert ByteTokenizer().decode([1, 100, 2]) == "a"
    assert ByteTokenizer().decode([1, 100, 2], skip_special=False) == "<bos>a<eos>"
    with pytest.raises(ValueError, match="must be in 0 to 258"):
        ByteTokenizer().decode([259])


@pytest.mark.parametrize("name", ["bytes", "bpe.json"])
def test_lossless_with_offsets_in_order(folder, name):
    tokenizer = load_tokenizer(name if name == "bytes" else str(folder / name))
    for text, encoding in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(encoding.ids) == text
        assert len(encoding.offsets) == len(encoding.ids)
        assert all(start < end for start, end in encoding.offsets)
        assert encoding.offsets == sorted(encoding.offsets)
        assert max(encoding.ids, default=0) < tokenizer.vocab_size


def test_digits_are_single_and_special_text_is_recognized(folder):
    tokenizer = load_tokenizer(str(folder / "bpe.json"))
    (encoding,) = tokenizer.encode_batch(["<bos>123<eos>"])
    assert [tokenizer.decode([i]) for i in encoding.ids[1:-1]] == ["1", "2", "3"]
    assert (encoding.ids[0], encoding.ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_fingerprints_depend_on_the_content(folder, tmp_path):
    one = load_tokenizer(str(folder / "bpe.json"))
    copy = tmp_path / "copy.json"
    copy.write_text((folder / "bpe.json").read_text())
    assert load_tokenizer(str(copy)).fingerprint == one.fingerprint
    assert FileTokenizer(str(copy), bos="").fingerprint != one.fingerprint
    assert small_bpe(tmp_path, vocab_size=300).fingerprint != one.fingerprint
    assert pickle.loads(pickle.dumps(one)).encode_batch(["a dog"]) == one.encode_batch(["a dog"])


def _renamed(folder, tmp_path, **names):
    text = (folder / "bpe.json").read_text()
    for old, new in names.items():
        text = text.replace(f'"<{old}>"', json.dumps(new))
    path = tmp_path / "renamed.json"
    path.write_text(text)
    return str(path)


def test_special_tokens_with_uncommon_names(folder, tmp_path):
    path = _renamed(folder, tmp_path, eos="<|done|>", pad="<|fill|>")
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*eos="):
        load_tokenizer(path)
    tokenizer = load_tokenizer(f"{path}?eos=<|done|>")
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 2)
    with pytest.raises(ValueError, match=r"`eos` must be a token of .*got '<nope>'"):
        load_tokenizer(f"{path}?eos=<nope>")
    with pytest.raises(ValueError, match="but got unk"):
        load_tokenizer(f"{path}?unk=x")


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a file of the tokenizers library"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_a_folder_of_a_vocabulary_and_merges_is_a_tokenizer(tmp_path):
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {text: index for index, text in enumerate([*letters, "ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (encoding,) = load_tokenizer(str(tmp_path)).encode_batch(["abc"])
    assert list(encoding.ids) == [ids["ab"], ids["c"]]


def test_a_model_needs_an_embedding_for_every_id():
    check_vocabulary(ByteTokenizer(), num_tokens=259)
    with pytest.raises(ValueError, match="has 258 tokens, but the tokenizer has 259"):
        check_vocabulary(ByteTokenizer(), num_tokens=258)


def test_training_reads_every_text_field(tmp_path):
    rows = [
        {"prompt": "aaaa", "chosen": [{"role": "assistant", "content": "bbbb"}], "rejected": "cccc"},
        {"messages": [{"role": "user", "content": "dddd"}], "response": "eeee", "text": "ffff", "other": "zzzz"},
    ] * 3
    output = tmp_path / "deep" / "tok.json"
    train_tokenizer([write_jsonl(tmp_path / "rows.jsonl", rows)], output=str(output), vocab_size=300)
    tokenizer = load_tokenizer(str(output))
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch([c * 4 for c in "abcdefz"])]
    assert lengths == [1, 1, 1, 1, 1, 1, 4]
    assert [file.name for file in output.parent.iterdir()] == ["tok.json"]


def _learned(output):
    """Return the letters of which four are one token."""
    tokenizer = load_tokenizer(str(output))
    return "".join(c for c in "abcdefxyz" if len(tokenizer.encode_batch([c * 4])[0].ids) == 1)


def test_training_on_sets_of_files_and_mixtures(tmp_path):
    """Folders, patterns and mixtures, with the columns of public data sets or with named ones."""
    folder, output = tmp_path / "rows", tmp_path / "tok.json"
    folder.mkdir()
    shared = {"conversations": [{"from": "human", "value": "aaaa"}, {"from": "gpt", "value": "bbbb"}], "id": "zzzz"}
    alpaca = {"instruction": "cccc", "input": "dddd", "output": "eeee", "system": "ffff", "other": {"said": ["xxxx"]}}
    first, second = (write_jsonl(folder / f"{i}.jsonl", [row] * 4) for i, row in enumerate((shared, alpaca)))
    for rows in (str(folder), f"{folder}/*.jsonl", [first, second], [{"source": first, "weight": 3}, {"source": [second]}]):
        train_tokenizer(rows, output=str(output), vocab_size=300)
        assert _learned(output) == "abcdef"
    train_tokenizer(second, output=str(output), vocab_size=300, columns=["other.said", "output"])
    assert _learned(output) == "ex"
    mixture = [{"source": first}, {"source": second, "columns": {"prompt": "other.said"}}]
    train_tokenizer(mixture, output=str(output), vocab_size=300)
    assert _learned(output) == "abx"
    for wrong, message in (
        ([{"sauce": first}], "must have a `source`.* but got no `source`"),
        ([{"source": first, "wieght": 2}], "but got an unknown 'wieght'"),
        (
            [{"source": first, "columns": {"prompt": "q"}}],
            r"0\.jsonl:1 has no column 'q', which `columns` names",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train_tokenizer(wrong, output=str(output))


def test_training_refuses_bad_input(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"other": "x"}])
    with pytest.raises(ValueError, match="have no text in the columns that are read"):
        train_tokenizer([rows], output=str(tmp_path / "tok.json"))
    with pytest.raises(ValueError, match=r"`vocab_size` must be at least 259.*got 258"):
        train_tokenizer([rows], output=str(tmp_path / "tok.json"), vocab_size=258)
    with pytest.raises(ValueError, match=r"ends in \.json"):
        train_tokenizer([rows], output=str(tmp_path / "tok"))
    assert not (tmp_path / "tok.json").exists()


def test_plain_template():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    segments = ByteTokenizer().render(messages, add_generation_prompt=True)
    assert "".join(segment.text for segment in segments) == "<|user|>\nhi\n<|assistant|>\nyo<|assistant|>\n"
    assert [(segment.text, segment.eos) for segment in segments if segment.trained] == [("yo", True)]
    with pytest.raises(ValueError, match="message 2"):
        ByteTokenizer().render([messages[0], {"role": "user"}], add_generation_prompt=False)


def test_ids_and_texts_of_tokens_are_known(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 2, "b": 5}, unk_token="<eos>"))
    model.add_special_tokens(["<eos>"])
    model.add_tokens(["added"])
    model.save(str(tmp_path / "holes.json"))
    tokenizer = load_tokenizer(str(tmp_path / "holes.json"))
    ids = model.get_vocab(with_added_tokens=True)
    assert tokenizer.vocab_size == 1 + max(ids.values())
    assert tokenizer.holes == set(range(tokenizer.vocab_size)) - set(ids.values()) and {1, 4} <= tokenizer.holes
    assert tokenizer.special_ids == {0}
    assert (tokenizer.token_id("b"), tokenizer.token_id("added"), tokenizer.token_id("c")) == (5, ids["added"], None)
    assert [ByteTokenizer().token_id(text) for text in ("<eos>", "a", "é", "ab")] == [2, 100, None, None]
