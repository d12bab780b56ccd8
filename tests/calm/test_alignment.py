"""Tests of alignment by characters: a position of the anchor sees an augment's token only after its last character."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from lightning_align.calm.alignment import Alignment, char_ends
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment, AugmentInput
from lightning_align.calm.text import OwnTokenizer
from lightning_align.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from tests.calm.toys import SMALL, connect
from tests.toys import gap, tiny_palm

BYTES = ByteTokenizer()


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "alpha": 3, "beta": 4, "gamma": 5}
    tokenizer = HFTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str())))
    return load_tokenizer(str(path))


def ids_of(text: str) -> list[int]:
    return [BYTES.bos_id or 1, *BYTES.encode_batch([text])[0].ids, BYTES.eos_id]


def inputs_of(tokens: torch.Tensor, mask: torch.Tensor | None, other: Tokenizer) -> AugmentInput:
    (given,) = Alignment(BYTES, [other]).inputs(tokens, mask)
    assert given is not None
    return given


def test_ends_count_whole_characters() -> None:
    text, ends = char_ends(BYTES, ids_of("aéb"))
    assert text == "aéb"
    assert ends == [0, 1, 1, 2, 3, 4], "bos, a, the two bytes of é, b, and the end-of-sequence token after the text"
    assert char_ends(BYTES, []) == ("", [])


def test_words_are_visible_once_they_have_ended(words: Tokenizer) -> None:
    own = OwnTokenizer(BYTES, words)
    ids, ends, columns, anchor_ends = own.read(ids_of("alpha beta"))
    assert ids == [3, 4, 1]
    assert ends == [5, 10, 11]
    assert columns == [6, 11, 11], "the space behind alpha, and the end of the text"
    assert anchor_ends == [0, *range(1, 11), 11]
    ids, ends, columns, _ = own.read(ids_of("alpha beta")[:-1])
    assert (ids, ends) == ([3, 4], [5, 10]), "a text without an end-of-sequence token gets none"
    assert columns == [6, 11], "nothing sees a word that may go on"
    assert own.read(ids_of("alpha beta")[:-1], num_prompt=11).columns == [6, 10], "a prompt does not go on"


def test_batches_are_padded(words: Tokenizer) -> None:
    rows = [ids_of("alpha beta gamma"), ids_of("beta")]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    given = inputs_of(tokens, mask, words)
    assert given.tokens.tolist() == [[3, 4, 5, 1], [4, 1, 0, 0]]
    assert given.mask is not None
    assert given.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_anchor_sees_only_complete_words(words: Tokenizer) -> None:
    anchor, augment = tiny_palm(num_tokens=259, dtype=torch.float64), tiny_palm(num_tokens=6, dtype=torch.float64, seed=1)
    model = connect(CALM(anchor, Augment(augment, tokens="own", num_connections=2), connection=SMALL))
    tokens = torch.tensor([ids_of("alpha beta gamma")])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    given = inputs_of(tokens, mask, words)
    want = model(tokens, inputs=[given])
    other = given.tokens.clone()
    other[0, 1] = 5  # "beta", which ends at the anchor's tenth letter
    changed = (model(tokens, inputs=[given._replace(tokens=other)]) - want).abs().amax(dim=(0, 2))
    assert changed[:11].max() == 0
    assert changed[11:].min() > 0
    ended = given.tokens.clone()
    ended[0, 3] = 2  # the end-of-sequence token, which the position that predicts it must not see
    changed = (model(tokens, inputs=[given._replace(tokens=ended)]) - want).abs().amax(dim=(0, 2))
    assert changed[:-1].max() == 0
    plain = anchor(tokens)
    assert gap(want[:, :6], plain[:, :6]) == 0, "nothing is visible before the first word is complete"
    assert model.make_cache is None


def test_alignment_by_characters_equals_alignment_by_columns_for_bytes() -> None:
    """With the byte tokenizer on both sides, alignment by characters and by columns show the same positions."""
    anchor, augment = tiny_palm(num_tokens=259, dtype=torch.float64), tiny_palm(num_tokens=259, dtype=torch.float64, seed=1)
    tokens = torch.tensor([ids_of("alpha beta")])
    given = inputs_of(tokens, None, BYTES)
    assert torch.equal(given.tokens, tokens)
    outputs = []
    for spec in (Augment(augment, tokens="own", num_connections=2), Augment(augment, num_connections=2)):
        model = connect(CALM(anchor, spec, connection=SMALL))
        outputs.append(model(tokens, inputs=[given if spec.tokens == "own" else None]))
        model.release()
    assert gap(*outputs) < 1e-5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, r"augment_tokenizers\[0\] must be null, because augment 0 reads the anchor's token ids. Set `tokens: own`"),
        (
            {"alignment": "prefix"},
            r"augment_tokenizers\[0\] must be null, because augment 0 reads a prefix .*whole rows with their responses",
        ),
    ],
)
def test_tokenizer_that_does_not_fit_the_augment_raises(spec: dict[str, Any], message: str) -> None:
    anchor, augment = tiny_palm(num_tokens=259), tiny_palm(num_tokens=259, seed=1)
    model = CALM(anchor, Augment(augment, num_connections=2, **spec), connection=SMALL)
    tokens = torch.tensor([ids_of("alpha beta")])
    with pytest.raises(ValueError, match=message):
        model(tokens, inputs=[inputs_of(tokens, None, BYTES)])


def test_batch_may_contain_states_instead_of_tokens() -> None:
    anchor, augment = tiny_palm(dtype=torch.float64), tiny_palm(dtype=torch.float64, seed=1)
    model = connect(CALM(anchor, Augment(augment, num_connections=2), connection=SMALL))
    tokens = torch.randint(1, 23, (2, 6))
    states = model.readers[0].read(tokens, None, None, None)
    given = AugmentInput(tokens, states=[states[depth] for depth in model.depths(0)])
    assert gap(model(tokens, inputs=[given]), model(tokens)) == 0
    with pytest.raises(ValueError, match="`inputs` must have one entry per augment, 1 in all, but got 2"):
        model(tokens, inputs=[given, None])
