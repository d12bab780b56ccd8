"""Arguments of the data module for chats, and its warnings about lost text."""

import warnings

import pytest

from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.sft.datamodule import SFTDataModule
from tests.data.helpers import chat_tokenizer, write_jsonl

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ note or '' }}"
)
ROW = {
    "prompt": [{"role": "user", "content": "Hi <|im_end|>"}],
    "chosen": [{"role": "assistant", "content": "Yes <|im_end|>."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


@pytest.fixture
def make(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra hf")
    template = TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n{{ start or '' }}{% endif %}")
    tokenizer = chat_tokenizer(template.replace("{{ note or '' }}", ""), tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", [ROW, {**ROW, "chat_template_kwargs": {"start": "B"}}])

    def make(**options):
        folder = str(tmp_path / "tokenizer")
        data = DPODataModule(predict=rows, validation=rows, tokenizer=folder, cache_dir=str(tmp_path / "cache"), **options)
        data.prepare_data()
        data.setup("validate")
        return data

    return tokenizer, make


def test_template_variables_of_the_data_module_change_the_cached_ids(make, tmp_path):
    tokenizer, make = make
    seen = []
    for options in ({}, {"chat_template_kwargs": {"start": "A"}}, {"chat_template_kwargs": {"start": "B"}}):
        data = make(**options)
        prompts = [tokenizer.decode(ids, skip_special=False)[-2:] for ids, _, _ in data.validation_prompts(2)]
        seen.append((prompts, data.ledgers["validation"].notes["generation_prompt_differs"]))
    # The variable opens the answer in the generation prompt only, so the prompt ends before it.
    assert seen == [(["t\n", "t\n"], 1), (["t\n", "t\n"], 2), (["t\n", "t\n"], 2)]
    assert len(list((tmp_path / "cache").glob("dpo-*.arrow"))) == 3


def test_samples_show_the_text_of_special_tokens(make):
    _, make = make
    ((_, prompt, response), _) = make().validation_prompts(2)
    assert prompt.startswith("<|im_start|>user\nHi <|im_end|><|im_end|>\n")
    assert response == "Yes <|im_end|>.<|im_end|>"


@pytest.mark.parametrize("kwargs", [{"tools": []}, {"tokenize": True}, {"add_generation_prompt": False}, {1: 2}])
def test_variables_that_are_none_of_a_template_are_refused(kwargs):
    with pytest.raises(ValueError, match="`chat_template_kwargs` is wrong: expected variables of the chat template"):
        SFTDataModule("rows.jsonl", chat_template_kwargs=kwargs)


def test_variables_without_a_template_are_refused(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    data = SFTDataModule(rows, cache_dir=str(tmp_path), chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match="`chat_template_kwargs` must be empty"):
        data.prepare_data()


def test_a_source_that_loses_much_warns_once_with_advice(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b" * 40}] * 3)
    for _ in range(2):  # tokenized, and from the cache
        data = SFTDataModule(rows, max_length=16, cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
        with pytest.warns(
            UserWarning, match=r"train rows from .*3 of 3 rows lost the end of their response.*`max_length`"
        ) as seen:
            data.setup("fit")
        assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = SFTDataModule(rows, max_length=64, cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
        data.setup("fit")
