import sys

import pytest

from lightning_align.data.tokenizer import load_tokenizer
from tests.data.helpers import encode, small_bpe, spell

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }};{% endif %}{% endfor %}"
NO_EOS = (
    "<bos>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "a fox"},
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "dog"},
]


def test_says_what_to_install_where_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-align\[hf\]'"):
        load_tokenizer("some/model")


@pytest.fixture
def make(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    small_bpe(tmp_path)

    def make(template: str, **options: str):
        source = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "bpe.json"), eos_token="<eos>", pad_token="<pad>", **options
        )
        source.chat_template = template
        source.save_pretrained(str(tmp_path / "saved"))
        return load_tokenizer(str(tmp_path / "saved"))

    return make


def test_masks_follow_the_template(make):
    tokenizer = make(CHATML)
    assert tokenizer.bos_id is None
    (row,), _ = encode({"messages": CHAT}, tokenizer=tokenizer, mask_turns="assistant_only")
    text, trained = spell(tokenizer, row)
    assert trained == "a fox<eos>dog<eos>"
    assert text.endswith("<|im_start|>assistant\ndog<eos>")
    assert text.count("<eos>") == 4
    (prompt,), _ = encode({"messages": CHAT}, tokenizer=tokenizer, prompts_only=True)
    assert tokenizer.decode(prompt.sides[0].tokens, skip_special=False).endswith("the<eos>\n<|im_start|>assistant\n")


def test_a_template_that_begins_and_does_not_end(make):
    tokenizer = make(NO_EOS, bos_token="<bos>")
    (row,), ledger = encode({"messages": CHAT}, tokenizer=tokenizer)
    text, trained = spell(tokenizer, row)
    assert text == "<bos>[user]the dog[assistant]a fox[user]the[assistant]dog<eos>"
    assert trained == "dog<eos>"
    assert ledger.notes["double_bos"] == 0


def test_a_template_that_rewrites_the_past_is_refused_by_name(make):
    with pytest.raises(ValueError, match=r"test:1 .*writes message 2 differently"):
        encode({"messages": CHAT}, tokenizer=make(FORGETFUL))


def test_a_name_that_does_not_exist(make):
    with pytest.raises(ValueError, match="cannot be loaded by transformers"):
        load_tokenizer("./no/such/folder")
