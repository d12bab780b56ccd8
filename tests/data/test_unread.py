"""Columns that are not read: they are counted, and a question in one of them is an error."""

import pytest

from lightning_align.data.ledger import Ledger
from lightning_align.data.packing import encode_blocks
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import ByteTokenizer
from tests.data.helpers import encode

A, B = {"role": "assistant", "content": "It rains."}, {"role": "assistant", "content": "It is sunny."}


@pytest.mark.parametrize(
    "name", ["instruction", "question", "prompt_text", "query", "input", "user", "problem", "Question", "post", "userPrompt"]
)
@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "It rains.", "rejected": "It is sunny."},
        {"chosen": "rains", "rejected": "sunny"},
        {"chosen": [A], "rejected": [B]},
        {"prompt": "", "chosen": "It rains.", "rejected": "It is sunny."},
        {"prompt": [], "chosen": [A], "rejected": [B]},
        {"prompt": "  ", "response": "It rains."},
        {"messages": [A]},
        {"messages": [{"role": "system", "content": "Be brief."}, A]},
    ],
)
def test_a_question_that_is_not_read_is_named_with_its_mapping(name, answers):
    _, ledger = encode({**answers, name: "How is the weather?"}, on_bad_row="skip")
    assert ledger.counts == {"dropped/question_not_read": 1}
    (line,) = ledger.examples["question_not_read"]
    assert f"has its question in field {name!r}" in line and f"columns: {{prompt: {name}}}" in line


@pytest.mark.parametrize(
    ("fields", "mapping"),
    [
        ({"response": "a", "instruction": "q"}, "columns: {prompt: instruction}"),
        ({"instruction": "q", "input": "", "output": "a"}, "columns: {prompt: instruction, response: output}"),
        ({"input": "x", "question": "q", "answer": "a"}, "columns: {prompt: question, response: answer}"),
        ({"prompt": "q", "completion": "a"}, "columns: {response: completion}"),
    ],
)
def test_a_missing_field_is_named_with_a_mapping(fields, mapping):
    _, ledger = encode(fields, on_bad_row="skip")
    assert ledger.counts == {"dropped/missing_field": 1}
    assert mapping in ledger.examples["missing_field"][0]


@pytest.mark.parametrize("column", [{"messages": [{"role": "user", "content": "Why?"}]}, {"text": "Why?"}])
def test_a_conversation_beside_plain_answers_is_not_lost(column):
    _, ledger = encode({"chosen": "It rains.", "rejected": "It is sunny.", **column}, on_bad_row="skip")
    assert ledger.counts == {"dropped/question_not_read": 1}


def test_a_question_that_is_read_already_is_no_error():
    start = "Human: Why?\n\nAssistant:"
    rows = [
        {"chosen": start + " Rain.", "rejected": start + " Sun.", "question": "Why?"},
        {"chosen": start + " Rain.", "rejected": start + " Sun.", "question": "Another wording of it"},
        {"chosen": "Why?\nRain.", "rejected": "Why?\nSun.", "question": "Why?"},
        {"prompt": "Why?", "chosen": "Rain.", "rejected": "Sun.", "instruction": "Be good."},
        {"chosen": "The sky is blue", "rejected": "The sky is red", "prompt_id": "abc", "source": "x", "category": "q a"},
        {"messages": [{"role": "user", "content": "Why?"}, A], "question": "Why?"},
    ]
    _, ledger = encode(*rows)
    assert ledger.counts == {"kept": 6}
    assert ledger.unread == {"question": 4, "instruction": 1, "prompt_id": 1, "source": 1, "category": 1}


def test_columns_that_were_not_read_are_counted_in_one_line():
    rows = [{"prompt": "a", "response": str(i), "id": i, "note": None if i else "x", "weight": 1} for i in range(3)]
    _, ledger = encode(*rows)
    assert ledger.unread == {"id": 3, "weight": 3, "note": 1}
    assert ledger.table().splitlines()[-1] == "  columns not read: id (3), weight (3), note (1)"
    assert Ledger.from_dict(ledger.to_dict()).unread == ledger.unread
    _, ledger = encode({"prompt": "a", "chosen": "b", "rejected": "c", "weight": 1, "margin": 2})
    assert not ledger.unread and "not read" not in ledger.table()
    _, ledger = encode({"prompt": "a", "response": "b", **{f"c{i}": i for i in range(40)}})
    assert ledger.table().splitlines()[-1].endswith("and 28 more")


def test_columns_beside_plain_text_are_counted():
    ledger = Ledger("test")
    rows = [Row({"text": "abc", "url": "u"}, ""), Row({"text": "abc", "url": None}, "")]
    list(encode_blocks(rows, tokenizer=ByteTokenizer(), ledger=ledger, max_length=16))
    assert ledger.unread == {"url": 1}
