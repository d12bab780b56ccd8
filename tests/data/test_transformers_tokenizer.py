import sys
from contextlib import nullcontext

import pytest
import tokenizers

from lightning_align.data.tokenizer import all_ends, load_tokenizer
from lightning_align.sft.datamodule import SFTDataModule
from tests.data.helpers import chat_tokenizer, encode, small_bpe, spell, write_jsonl

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


def test_missing_transformers_gives_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-align\[hf\]'"):
        load_tokenizer("some/model")


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    small_bpe(tmp_path)

    def make(template: str, *, adds_bos: bool = False, **options: str | None):
        file = tokenizers.Tokenizer.from_file(str(tmp_path / "bpe.json"))
        if adds_bos:
            file.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
        specials = {"eos_token": "<eos>", "pad_token": "<pad>", **options}
        source = transformers.PreTrainedTokenizerFast(tokenizer_object=file, **specials)
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


def test_a_template_with_bos_and_without_eos(make):
    with pytest.warns(UserWarning, match="saved does not end the turns of the assistant with <eos>: training adds it"):
        tokenizer = make(NO_EOS, bos_token="<bos>")
    (row,), ledger = encode({"messages": CHAT}, tokenizer=tokenizer)
    text, trained = spell(tokenizer, row)
    assert text == "<bos>[user]the dog[assistant]a fox[user]the[assistant]dog<eos>"
    assert trained == "dog<eos>"
    assert ledger.notes["double_bos"] == 0


def test_a_template_with_an_end_of_its_own_ends_targets_with_it(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra hf")
    template = CHATML.replace("<eos>", "<|im_end|>")
    tokenizer = chat_tokenizer(template, tmp_path / "own", eos="<eos>")
    assert [tokenizer.decode([i], skip_special=False) for i in all_ends(tokenizer)] == ["<eos>", "<|im_end|>"]
    (row,), ledger = encode({"messages": CHAT}, tokenizer=tokenizer, mask_turns="assistant_only")
    assert spell(tokenizer, row)[1] == "a fox<|im_end|>dog<|im_end|>"
    assert row.sides[0].num_bytes == len("a fox" + "dog") and not ledger.notes
    # A template that writes the end-of-sequence token behind each turn has no other end, whatever stands in front of it.
    other = chat_tokenizer(template.replace("<|im_end|>", "<|im_end|><eos>"), tmp_path / "other", eos="<eos>")
    assert all_ends(other) == (other.eos_id,)
    (row,), _ = encode({"messages": CHAT}, tokenizer=other)
    assert spell(other, row)[1] == "dog<|im_end|><eos>"
    # Rows of strings have no template, so they end with the end-of-sequence token.
    (row,), _ = encode({"prompt": "the dog", "response": "a fox"}, tokenizer=tokenizer)
    assert spell(tokenizer, row)[1] == "a fox<eos>"
    assert tokenizer.fingerprint != chat_tokenizer(template, tmp_path / "same", eos="<|im_end|>").fingerprint


def test_a_base_model_without_an_end_token_gets_one_by_its_text(make):
    with pytest.raises(ValueError, match=r"has no end-of-sequence token\. Give its text, such as .*saved\?eos_token="):
        make("", eos_token=None)
    with pytest.raises(ValueError, match=r"`eos_token` must be a token of tokenizer .*saved', but got '<nope>'"):
        load_tokenizer("saved?eos_token=<nope>")
    tokenizer = load_tokenizer("saved?eos_token=<eos>&pad_token=<bos>")
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.pad_id], skip_special=False) == "<eos><bos>"
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    (row,), _ = encode({"prompt": "the dog", "response": "a fox"}, tokenizer=tokenizer)
    assert spell(tokenizer, row)[1] == "a fox<eos>"
    tokenizer.save("written")
    assert load_tokenizer("written").eos_id == tokenizer.eos_id
    with pytest.raises(ValueError, match="Remove the options after 'bytes'"):
        load_tokenizer("bytes?eos_token=x")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("<bos>" + CHATML, None),
        ("<bos><bos>" + CHATML, "begins with <bos> twice"),
        (CHATML, "does not begin with <bos>: training adds it"),
        ("<bos>" + CHATML.replace("<eos>", "<eos><eos>"), "assistant with <eos> twice: training uses the first only"),
        (CHATML.replace("<eos>", ""), r"not begin with <bos>.*; it does not end the turns of the assistant with <eos>"),
    ],
)
def test_templates_that_drop_or_repeat_special_tokens_give_a_warning(make, template, fault):
    with nullcontext() if fault is None else pytest.warns(UserWarning, match=f"the chat template of .*{fault}"):
        tokenizer = make(template, bos_token="<bos>", adds_bos=True)
    (row,), _ = encode({"messages": CHAT}, tokenizer=tokenizer)
    text, trained = spell(tokenizer, row)
    assert text.count("<bos>") == 1 and text.startswith("<bos>")
    assert trained.replace("\n", "") == "dog<eos>"


def test_a_template_that_renders_earlier_turns_differently_trains_the_last_turn_only(make):
    tokenizer = make(FORGETFUL)
    (row,), _ = encode({"messages": CHAT}, tokenizer=tokenizer)
    assert spell(tokenizer, row) == ("the dog;the;dog;<eos>", "dog;<eos>")
    with pytest.raises(ValueError, match=r"test:1 .*renders message 2 differently.*`mask_turns` 'last_turn'"):
        encode({"messages": CHAT}, tokenizer=tokenizer, mask_turns="assistant_only")


def test_the_last_turn_follows_the_history_as_it_is_written_at_generation(make):
    # The last turn of the assistant is written with a mark, which is another turn when no answer follows.
    marked = (
        "{% set last = namespace(i=-1) %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set last.i = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.index0 == last.i %}* {% endif %}"
        "{{ m['content'] }}<eos>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make(marked)
    (row,), ledger = encode({"messages": CHAT}, tokenizer=tokenizer)
    text, trained = spell(tokenizer, row)
    assert trained == "* dog<eos>" and "assistant\n* a fox<eos>" in text and text.count("*") == 2
    (prompt,), _ = encode({"prompt": CHAT[:3]}, tokenizer=tokenizer, prompts_only=True)
    assert prompt.sides[0].tokens == row.sides[0].tokens[: row.num_prompt]
    pair = {"prompt": CHAT[:3], "chosen": CHAT[3:], "rejected": "a fox"}
    (both,), _ = encode(pair, tokenizer=tokenizer)
    assert both.sides[0] == row.sides[0] and spell(tokenizer, both, 1)[1] == "* a fox<eos>"
    assert not ledger.notes


def test_a_template_that_rejects_a_row_names_the_row(make):
    refusing = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no systems here') }}{% endif %}"
    tokenizer = make(refusing + CHATML.partition("%}")[2])
    row = {"messages": [{"role": "system", "content": "be brief"}, *CHAT]}
    with pytest.raises(ValueError, match=r"test:1 .*the chat template of .*saved rejects the messages \(no systems here"):
        encode(row, tokenizer=tokenizer)


def test_a_tokenizer_without_a_pad_token_pads_with_eos_which_is_still_a_target(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make(CHATML, pad_token=None)
    assert tokenizer.pad_id == tokenizer.eos_id
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    data = SFTDataModule(rows, tokenizer=str(tmp_path / "saved"), batch_size=2, max_length=256)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    ends = (batch["tokens"] == tokenizer.eos_id) & batch["targets"]
    assert ends.sum(dim=1).tolist() == [1, 1]
    short = batch["mask"].sum(dim=1).argmin()
    assert not batch["mask"][short].all() and not batch["targets"][short][~batch["mask"][short]].any()


def test_a_name_that_does_not_exist(make):
    with pytest.raises(ValueError, match="cannot be loaded by transformers"):
        load_tokenizer("./no/such/folder")
