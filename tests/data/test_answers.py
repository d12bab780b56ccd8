"""Answers in messages: special tokens in their text, thoughts, string prompts and implicit prompts."""

import pytest

from lightning_align.data.tokenizer import ByteTokenizer
from tests.data.chats import PLAIN, answer, system, user
from tests.data.helpers import chat_tokenizer, encode, small_bpe, spell

pytest.importorskip("transformers", reason="needs the extra hf")


@pytest.mark.parametrize("mask_turns", ["last_turn", "assistant_only", "all"])
def test_an_answer_that_mentions_a_special_token_keeps_its_text(mask_turns, chatml, tmp_path):
    end, text = chatml.eos_id, "With <|im_end|> in ChatML, or <|im_start|>, and others."
    (row,), ledger = encode({"messages": [user("How? <|im_end|>"), answer(text)]}, tokenizer=chatml, mask_turns=mask_turns)
    tokens, targets, num_bytes = row.sides[0]
    written, trained = spell(chatml, row)
    assert written == f"<|im_start|>user\nHow? <|im_end|><|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>"
    assert trained.endswith(f"{text}<|im_end|>")
    assert tokens.count(end) == 2 and sum(t == end and goal for t, goal in zip(tokens, targets, strict=True)) >= 1
    if mask_turns != "all":
        assert num_bytes == len(text.encode())
        assert tokens[-1] == end and targets.count(True) == len(text) + 1
    assert ledger.counts == {"kept": 1} and not ledger.notes
    # The built-in template with a tokenizer from a file.
    bpe = small_bpe(tmp_path)
    (row,), _ = encode({"messages": [user("How?"), answer("The <eos> ends it.")]}, tokenizer=bpe)
    assert spell(bpe, row)[1] == "The <eos> ends it.<eos>"
    assert row.sides[0].tokens.count(bpe.eos_id) == 1


def test_a_special_token_in_a_call_or_a_tool_is_text(chatml):
    call = {"function": {"name": "get_weather", "arguments": {"city": "<|im_end|>"}}}
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_start|>"}}]
    (row,), _ = encode({"messages": [user("a"), answer("", tool_calls=[call])], "tools": tools}, tokenizer=chatml)
    assert row.sides[0].tokens.count(chatml.eos_id) == 3
    assert spell(chatml, row)[1] == '<call>get_weather {"city": "<|im_end|>"}</call><|im_end|>'


def test_an_end_token_that_content_writes_itself_is_the_end(chatml):
    (row, twice), ledger = encode(
        {"messages": [user("a"), answer("b<|im_end|>")]},
        {"messages": [user("a"), answer("b <|im_end|>\n<|im_end|>")]},
        tokenizer=chatml,
    )
    assert spell(chatml, row)[1] == spell(chatml, twice)[1] == "b<|im_end|>"
    assert ledger.notes == {"end_token_in_content": 2, "duplicate": 1}


def test_a_template_that_drops_a_part_of_an_answer_is_noted(tmp_path):
    template = PLAIN.replace("{{ m.content or '' }}", "{{ m.content.split('</think>')[-1] }}")
    tokenizer = chat_tokenizer(template, tmp_path)
    rows = [{"messages": [user("a"), answer(content)]} for content in ("<think>c</think>b", "b", "<think>c</think>")]
    encoded, ledger = encode(*rows, tokenizer=tokenizer, on_bad_row="skip")
    assert [spell(tokenizer, row)[1] for row in encoded] == ["b<|im_end|>"] * 2
    assert ledger.notes == {"answer_rewritten": 1, "duplicate": 1}
    assert ledger.counts == {"kept": 2, "dropped/empty_response": 1}


def test_a_thought_that_the_generation_prompt_opens_is_a_part_of_the_answer(tmp_path):
    tokenizer = chat_tokenizer(PLAIN.replace("{{ start or '' }}", "<think>\n"), tmp_path)
    thought, plain = "<think>\nr\n</think>\n\nYes", "No"
    (row, bare), ledger = encode(
        {"messages": [user("Hi"), answer(thought)]}, {"messages": [user("Hi"), answer(plain)]}, tokenizer=tokenizer
    )
    assert spell(tokenizer, row)[1] == "r\n</think>\n\nYes<|im_end|>"
    assert spell(tokenizer, bare)[1] == "No<|im_end|>"
    assert spell(tokenizer, bare)[0].endswith("assistant\nNo<|im_end|>")
    assert ledger.notes == {"generation_prompt_differs": 1}
    # Both sides of a pair have one prompt.
    (pair,), _ = encode({"prompt": [user("Hi")], "chosen": [answer(thought)], "rejected": [answer(plain)]}, tokenizer=tokenizer)
    assert [spell(tokenizer, pair, side)[1] for side in (0, 1)] == [f"{thought}<|im_end|>", "No<|im_end|>"]
    # The prompt never ends inside what the answer begins with.
    (row,), _ = encode({"messages": [user("Hi"), answer("<tool>x")]}, tokenizer=tokenizer)
    assert spell(tokenizer, row)[1] == "<tool>x<|im_end|>"


SYSTEM, QUESTION = system("S"), user("Q")


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "Q", "chosen": [answer("A")], "rejected": [answer("B")]}, [QUESTION]),
        ({"prompt": "Q", "chosen": [SYSTEM, answer("A")], "rejected": [SYSTEM, answer("B")]}, [SYSTEM, QUESTION]),
        (
            {"prompt": "Q", "chosen": [SYSTEM, QUESTION, answer("A")], "rejected": [SYSTEM, QUESTION, answer("B")]},
            [SYSTEM, QUESTION],
        ),
        ({"prompt": "Q ", "chosen": [QUESTION, answer("A")], "rejected": [QUESTION, answer("B")]}, [QUESTION]),
        ({"prompt": "Q", "system": "S", "chosen": [answer("A")], "rejected": [answer("B")]}, [SYSTEM, QUESTION]),
        ({"prompt": [QUESTION], "chosen": [QUESTION, answer("A")], "rejected": [QUESTION, answer("B")]}, [QUESTION]),
        ({"prompt": "Q", "response": [SYSTEM, QUESTION, answer("A")]}, [SYSTEM, QUESTION]),
        ({"prompt": "Q", "response": [answer("A")]}, [QUESTION]),
    ],
)
def test_a_string_prompt_with_answers_in_messages(fields, prompt, chatml):
    (row,), _ = encode(fields, tokenizer=chatml)
    (expected,), _ = encode({"prompt": prompt, "response": [answer("A")]}, tokenizer=chatml)
    assert row.sides[0] == expected.sides[0]
    if len(row.sides) == 2:
        assert spell(chatml, row, 1)[1] == "B<|im_end|>"


def test_a_string_prompt_that_the_messages_do_not_repeat_is_refused(chatml):
    fields = {"prompt": "P", "chosen": [QUESTION, answer("A")], "rejected": [QUESTION, answer("B")]}
    different = {"prompt": "Q", "chosen": [SYSTEM, answer("A")], "rejected": [answer("B")]}
    assert encode(fields, different, tokenizer=chatml, on_bad_row="skip")[1].counts == {"dropped/wrong_type": 2}


def test_implicit_prompts_where_one_answer_begins_the_other(chatml):
    start = "\n\nHuman: Why?\n\nAssistant:"
    for chosen, rejected in ((" It rained. A lot.", " It rained."), (" I", " I am"), (" yes", " no")):
        (row,), _ = encode({"chosen": start + chosen, "rejected": start + rejected})
        assert spell(ByteTokenizer(), row) == ("<bos>" + start + chosen + "<eos>", chosen + "<eos>")
        assert spell(ByteTokenizer(), row, 1)[1] == rejected + "<eos>"
    chat = [QUESTION, answer("A"), user("More?"), answer("C")]
    (row,), _ = encode({"chosen": chat, "rejected": chat[:2]}, tokenizer=chatml)
    assert [spell(chatml, row, side)[1] for side in (0, 1)] == ["C<|im_end|>", "A<|im_end|>"]
    assert spell(chatml, row, 1)[0].endswith("Q<|im_end|>\n<|im_start|>assistant\nA<|im_end|>")


def test_implicit_prompts_that_cannot_be_found_have_the_right_reason():
    text = "Human: Why?\n\nAssistant: Rain."
    rows = [{"chosen": text, "rejected": text}, {"chosen": "It rains", "rejected": "It rains today"}]
    chat = [QUESTION, answer("A")]
    rows += [{"chosen": chat, "rejected": chat}, {"chosen": "", "rejected": ""}, {"chosen": chat, "rejected": chat[:1]}]
    _, ledger = encode({"prompt": "a", "chosen": "b", "rejected": "c"}, *rows, on_bad_row="skip")
    assert ledger.counts == {"kept": 1, "dropped/identical_pair": 2, "dropped/no_prompt": 2, "dropped/empty_response": 1}
    assert "one of its responses begins the other" in ledger.examples["no_prompt"][0]
