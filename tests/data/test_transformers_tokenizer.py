import sys
from contextlib import nullcontext

import pytest
import tokenizers

from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.sft.datamodule import SFTDataModule
from tests.data.helpers import encode, small_bpe, spell, write_jsonl

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
def make(tmp_path):
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


def test_a_template_that_renders_earlier_turns_differently_is_an_error(make):
    with pytest.raises(ValueError, match=r"test:1 .*renders message 2 differently"):
        encode({"messages": CHAT}, tokenizer=make(FORGETFUL))


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
