"""The ends of a response: where they come from, and what becomes of the answers of other engines."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.generation.answers import close_answer
from lightning_align.generation.ends import Ends, end_ids
from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.generation.stop import StopTexts
from lightning_align.generation.support import Support
from lightning_align.models.language_model import declared_ends
from lightning_align.models.pretrained import PretrainedLM
from tests.toys import tiny_palm

BYTES = ByteTokenizer()
TURN = SimpleNamespace(eos_id=2, end_ids=(7,), vocab_size=20, holes=frozenset({11}), decode=str)
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 30, **SIZES}


def test_ends_are_those_of_tokenizer_model_and_user_in_this_order() -> None:
    model = SimpleNamespace(eos_ids=(9, 2, 11, 25))
    ends = Ends.of(tokenizer=TURN, model=model, config=GenerationConfig(eos_token=[5, 9]))
    assert ends.ids == (2, 7, 9, 5)  # 11 is a hole and 25 is behind the vocabulary
    assert ends.own == 2
    assert ends.described() == {"eos_token_id": [2, 7, 9, 5], "stop": [], "vocab_size": 20, "holes": [11]}
    assert Ends.of().ids == () and Ends.of().own is None
    assert Ends.of(model=SimpleNamespace(eos_ids=(4,))).ids == (4,)
    assert Ends.of(tokenizer=BYTES).ids == (2,)


def test_end_tokens_of_the_user_are_texts_or_ids() -> None:
    for given, expected in (("<pad>", (2, 0)), (0, (2, 0)), (["<bos>", 0], (2, 1, 0)), ("\n", (2, 13)), ("<eos>", (2,))):
        assert end_ids(tokenizer=BYTES, eos_token=given) == expected
    for given in ("<|im_end|>", 259, [0, "<|im_end|>"]):
        with pytest.raises(ValueError, match=r"`eos_token` must be a token of the tokenizer, but got .*no such token"):
            end_ids(tokenizer=BYTES, eos_token=given)
    assert end_ids(eos_token=[4, 5]) == (4, 5)
    with pytest.raises(ValueError, match=r"there is no tokenizer\. Give its id"):
        end_ids(eos_token="<|im_end|>")


def test_settings_of_the_module_apply_where_others_have_none() -> None:
    module = GenerationConfig(eos_token=5, stop=["x"])
    ends = Ends.of(tokenizer=BYTES, config=GenerationConfig(), default=module)
    assert ends.ids == (2, 5) and ends.stop is not None and ends.stop.texts == ("x",)
    ends = Ends.of(tokenizer=BYTES, config=GenerationConfig(eos_token=6, stop="yz"), default=module)
    assert ends.ids == (2, 6) and ends.stop is not None and ends.stop.texts == ("yz",)
    with pytest.raises(ValueError, match=r"`stop` is .* which needs a tokenizer"):
        Ends.of(config=module)
    ends = Ends.of(tokenizer=BYTES)
    with pytest.raises(ValueError, match=r"`ends` has no stop texts\. Build it with"):
        generate(tiny_palm(num_tokens=259), [[1]], module, ends=ends)


def test_an_end_that_is_an_ordinary_token_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert end_ids(tokenizer=BYTES, model=SimpleNamespace(eos_ids=(2, 100, 400))) == (2, 100)
    assert "100, in the tokenizer the ordinary token 'a'" in caplog.text
    assert "[400], which the tokenizer lacks" in caplog.text


def test_without_ends_the_declared_ids_of_the_model_join_the_given_ones() -> None:
    model, config = SimpleNamespace(eos_ids=(9, 5)), GenerationConfig()
    for given, expected in ((None, ()), (5, (5, 9)), ([3, 5], (3, 5, 9))):
        assert Ends.exactly(given, config=config, model=model).ids == expected
    assert Ends.exactly(None, config=GenerationConfig(eos_token=4), model=model).ids == (4,)


def test_each_end_ends_a_response_and_is_recorded() -> None:
    model = tiny_palm()
    config = GenerationConfig(max_new_tokens=20, temperature=0)
    (full,) = generate(model, [[3, 1, 4]], config)[0]
    places = {token: full.tokens.index(token) for token in full.tokens}
    first, second = sorted(places, key=lambda token: places[token])[2:4]
    for given, end in (([second, first], first), ([second], second)):
        (answer,) = generate(model, [[3, 1, 4]], config, ends=Ends(tuple(given)))[0]
        assert answer == Generation(full.tokens[: places[end]], True)
        assert answer.end == end and answer.reason == "eos" and len(answer.logprobs) == len(answer.tokens) + 1
    assert full.end is None and full.reason == "length"


# -- what a model declares


def test_only_what_someone_set_is_declared() -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    assert PretrainedLM(config=LLAMA).eos_ids == ()  # the class has a default of 2, which nobody chose
    assert PretrainedLM(config={**LLAMA, "eos_token_id": 3}).eos_ids == (3,)
    assert PretrainedLM(config=LLAMA, eos_token_id=[4, 5]).eos_ids == (4, 5)
    assert PretrainedLM(config=LLAMA, eos_token_id=6).eos_ids == (6,)
    assert declared_ends(tiny_palm()) == ()


def test_the_generation_settings_of_a_folder_are_declared_and_survive_without_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    model = PretrainedLM(config=LLAMA).model
    model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(tmp_path / "a")
    loaded = PretrainedLM(str(tmp_path / "a"))
    assert loaded.eos_ids == (1, 3)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ValueError, match="no such folder"):
        PretrainedLM(str(tmp_path / "a"))
    assert PretrainedLM(**loaded.init_args).eos_ids == (1, 3)  # as a checkpoint rebuilds it


# -- answers of other engines

ENDS = Ends((2, 7), StopTexts(["ab"], lambda ids: "".join(chr(90 + token) for token in ids)), Support(15, frozenset({13})))


@pytest.mark.parametrize(
    ("tokens", "reason", "end", "expected"),
    [
        ([3, 4], "length", None, ([3, 4], "length", None, 0)),
        ([3, 4], "eos", None, ([3, 4], "eos", 2, 0)),
        ([3, 4], "eos", 7, ([3, 4], "eos", 7, 0)),
        ([3, 4, 7], "eos", None, ([3, 4], "eos", 7, 0)),
        ([3, 4, 7], "length", None, ([3, 4], "eos", 7, 0)),  # the limit counts the end
        ([3, 7, 4, 2], "eos", None, ([3], "eos", 7, 0)),
        ([3, 13, 4, 99, 7], "eos", None, ([3], "length", None, 2)),
        ([3, 7, 99], "length", None, ([3], "eos", 7, 1)),
        ([99], "length", None, ([], "length", None, 1)),
        ([], "eos", None, ([], "eos", 2, 0)),
        ([6, 7 + 1, 7], "stop", None, ([6, 8], "eos", 7, 0)),
        ([7 + 0], "eos", 2, ([], "eos", 7, 0)),
    ],
)
def test_answers_of_engines_get_the_form_of_our_own(tokens, reason, end, expected) -> None:
    answer = close_answer(tokens, reason, ENDS, end=end)
    assert (answer.tokens, answer.reason, answer.end, answer.unsupported) == expected
    assert answer.finished == (answer.reason != "length")


def test_an_answer_of_an_engine_ends_with_the_first_stop_text() -> None:
    stop = StopTexts(["ab"], BYTES.decode)
    ids = BYTES.encode_batch(["xabyab"])[0].ids
    answer = close_answer(ids, "length", Ends((2,), stop), logprobs=[float(-n) for n in range(6)])
    assert BYTES.decode(answer.tokens) == "xab" and answer.reason == "stop" and answer.logprobs == [0, -1, -2]


def test_log_probs_are_cut_with_their_tokens() -> None:
    assert close_answer([3, 4, 7], "eos", ENDS, logprobs=[-1, -2, -3]).logprobs == [-1, -2, -3]
    assert close_answer([3, 4], "eos", ENDS, logprobs=[-1, -2, -3]).logprobs == [-1, -2, -3]
    assert close_answer([3, 99, 4], "length", ENDS, logprobs=[-1, -2, -3]).logprobs == [-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reason": "done"}, "`reason` must be eos, stop or length, but got 'done'"),
        ({"end": 5}, r"`end` must be one of the end-of-sequence ids \[2, 7\], but got 5"),
        ({"logprobs": [0.0]}, "`logprobs` must have one value per token, but got 1 values for 3 tokens"),
        ({"reason": "eos", "ends": Ends()}, "no id ends a response"),
    ],
)
def test_answers_that_contradict_themselves_raise(arguments: dict[str, Any], message: str) -> None:
    given = {"reason": "length", "ends": ENDS, **arguments}
    with pytest.raises(ValueError, match=message):
        close_answer([3, 4, 5], given.pop("reason"), given.pop("ends"), **given)


def test_samples_of_a_model_with_two_ends_have_the_right_frequencies() -> None:
    """A model that draws independently ends with probability p1 + p2 at each step, at either end in proportion."""

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor([0.5, 0.2, 0.2, 0.1]).log())

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(*tokens.shape, -1)

    config = GenerationConfig(max_new_tokens=3, num_samples=8000)
    (rows,) = generate(Fixed(), [[0]], config, ends=Ends((2, 3)))
    expected = {2: 0.2 * (1 + 0.7 + 0.49), 3: 0.1 * (1 + 0.7 + 0.49), None: 0.7**3}
    counts = {end: sum(row.end == end for row in rows) for end in expected}
    chi = sum((counts[end] - 8000 * share) ** 2 / (8000 * share) for end, share in expected.items())
    assert chi < 13.8  # 2 degrees of freedom, once in 1,000
