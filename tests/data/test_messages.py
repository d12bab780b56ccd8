"""Rows of messages: what reaches the chat template, what is trained, and what is refused."""

import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_align.data.messages import normalize_messages, read_tools
from lightning_align.data.rows import read_rows
from lightning_align.data.tokenizer import ByteTokenizer
from tests.data.chats import CHATML, TOOLS, answer, system, user
from tests.data.helpers import chat_tokenizer, encode, small_bpe, spell, write_jsonl

pytest.importorskip("transformers", reason="needs the extra hf")

FORMS = {
    "messages": {"messages": [user("Rome?"), answer("Sunny.")]},
    "response": {"prompt": [user("Rome?")], "response": [answer("Sunny.")]},
    "response as a string": {"prompt": [user("Rome?")], "response": "Sunny."},
    "pair": {"prompt": [user("Rome?")], "chosen": [answer("Sunny.")], "rejected": [answer("No idea.")]},
    "pair without a prompt": {"chosen": [user("Rome?"), answer("Sunny.")], "rejected": [user("Rome?"), answer("No idea.")]},
    "pair with a string": {"prompt": "Rome?", "chosen": [answer("Sunny.")], "rejected": [answer("No idea.")]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])], TOOLS[0]])
def test_tools_reach_the_template_of_every_form(form, tools, chatml):
    (row,), ledger = encode(FORMS[form] | {"tools": tools}, tokenizer=chatml)
    (bare,), _ = encode(FORMS[form], tokenizer=chatml)
    for side in range(len(row.sides)):
        text, trained = spell(chatml, row, side)
        assert text == f"<|im_start|>system\nTools: {json.dumps(TOOLS)}<|im_end|>\n" + spell(chatml, bare, side)[0]
        assert trained == spell(chatml, bare, side)[1]
    assert not ledger.notes and not ledger.unread


def test_tools_reach_prompts_for_prediction(chatml):
    for fields in ({"prompt": [user("Rome?")]}, {"messages": [user("Rome?"), answer("Sunny.")]}):
        (row,), _ = encode(fields | {"tools": TOOLS}, tokenizer=chatml, prompts_only=True)
        assert "get_weather" in spell(chatml, row)[0]


def test_tools_that_no_template_shows_are_noted(plain, tmp_path):
    rows = [FORMS["messages"] | {"tools": TOOLS}, {"prompt": "a", "response": "b", "tools": TOOLS}]
    for tokenizer in (plain, ByteTokenizer(), small_bpe(tmp_path)):
        _, ledger = encode(*rows, tokenizer=tokenizer)
        assert ledger.notes["tools_not_shown"] == 2
        assert ledger.unread == {"tools": 2}
        assert "columns not read: tools (2)" in ledger.table()


@pytest.mark.parametrize("tools", ["{", 7, [3], "[3]", '"x"'])
def test_tools_of_another_type_are_refused(tools, chatml):
    _, ledger = encode(FORMS["messages"] | {"tools": tools}, tokenizer=chatml, on_bad_row="skip")
    assert ledger.counts == {"dropped/wrong_type": 1}


def test_nulls_in_the_json_of_a_tool_are_meant():
    schema = {"name": "f", "default": None}
    assert read_tools(json.dumps([schema])) == [schema]
    assert read_tools([schema]) == [{"name": "f"}]
    assert read_tools("") is read_tools([]) is read_tools("[]") is None


def test_template_variables_of_rows_have_priority(chatml):
    rows = [FORMS["pair"], FORMS["pair"] | {"chat_template_kwargs": {"start": "B"}}]
    rows.append(FORMS["pair"] | {"chat_template_kwargs": '{"start": "C"}'})
    _, ledger = encode(*rows, tokenizer=chatml, chat_template_kwargs={"start": "A"})
    assert not ledger.unread
    prompts, _ = encode(*rows, tokenizer=chatml, prompts_only=True, chat_template_kwargs={"start": "A"})
    assert [spell(chatml, row)[0][-2:] for row in prompts] == ["\nA", "\nB", "\nC"]
    with pytest.raises(ValueError, match=r"`chat_template_kwargs` must be empty.*has no chat template"):
        encode(FORMS["pair"], chat_template_kwargs={"start": "A"})
    _, ledger = encode(FORMS["pair"] | {"chat_template_kwargs": {"tokenize": True}}, tokenizer=chatml, on_bad_row="skip")
    assert ledger.counts == {"dropped/wrong_type": 1}


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"training": 0}])
def test_messages_marked_as_not_to_be_trained_on(flag, chatml):
    chat = [user("2+2?"), answer("Five.", **flag), user("Again"), answer("Four.", weight=1, train=True)]
    for tokenizer in (chatml, ByteTokenizer()):
        for mask_turns in ("assistant_only", "all"):
            (row,), _ = encode({"messages": chat}, tokenizer=tokenizer, mask_turns=mask_turns)
            text, trained = spell(tokenizer, row)
            assert "Five" in text and "Five" not in trained and "Four." in trained
        bare = [user("2+2?"), answer("Five."), user("Again"), answer("Four.")]
        assert encode({"messages": chat}, tokenizer=tokenizer)[0] == encode({"messages": bare}, tokenizer=tokenizer)[0]


def test_a_marked_last_turn_leaves_no_target_and_is_counted(chatml):
    good, marked = FORMS["messages"], {"messages": [user("Rome?"), answer("Rain.", weight=0)]}
    pair = {"prompt": [user("Rome?")], "chosen": [answer("Sun.")], "rejected": [answer("Rain.", train=False)]}
    rows, ledger = encode(good, marked, pair, tokenizer=chatml)  # and no error, although `on_bad_row` is fail
    assert [row.row for row in rows] == [0]
    assert ledger.counts == {"kept": 1, "dropped/no_target": 2}
    marked_user = {"messages": [user("secret", weight=0), answer("yes")]}
    (row,), _ = encode(marked_user, tokenizer=chatml, mask_turns="all")
    assert spell(chatml, row)[1] == "yes<|im_end|>"


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"train_detail": [{"begin_offset": 0}]}])
def test_marks_that_cannot_be_followed_are_refused(flag, chatml):
    _, ledger = encode({"messages": [user("a"), answer("b", **flag)]}, tokenizer=chatml, on_bad_row="skip")
    assert ledger.counts == {"dropped/wrong_type": 1}


@pytest.mark.parametrize("form", FORMS)
def test_a_system_column_is_a_system_turn(form, chatml):
    (row,), ledger = encode(FORMS[form] | {"system": "Be brief."}, tokenizer=chatml)
    assert spell(chatml, row)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRome?")
    assert not ledger.unread


def test_a_system_column_beside_a_system_turn_or_strings_is_not_read(chatml):
    chat = {"messages": [system("Be kind."), user("a"), answer("b")]}
    (same, blank, other), ledger = encode(
        chat | {"system": "Be kind. "}, chat | {"system": " "}, chat | {"system": "Be brief."}, tokenizer=chatml
    )
    assert same.sides == blank.sides == other.sides
    assert ledger.unread["system"] == 2
    _, ledger = encode({"prompt": "a", "response": "b", "system": "Be brief."}, tokenizer=chatml)
    assert ledger.unread == {"system": 1}


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Hello!"}],
        [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!", "annotations": None, "image_url": None}],
        ["Hel", "lo!"],
        [[{"text": "Hello"}], "!"],
        [{"type": "output_text", "text": "Hello!"}, None],
    ],
)
def test_content_in_parts_is_text(content, chatml):
    expected, _ = encode({"messages": [user("Hi"), answer("Hello!")]}, tokenizer=chatml)
    for fields in (
        {"messages": [user([{"type": "text", "text": "Hi"}]), answer(content)]},
        {"prompt": [user("Hi")], "response": [answer(content)]},
    ):
        assert encode(fields, tokenizer=chatml)[0] == expected
        assert spell(ByteTokenizer(), encode(fields)[0][0])[1] == "Hello!<eos>"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "part of the type 'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "audio", "audio": "x"}], "part of the type 'audio'"),
        ([{"type": "tool_result", "content": "x"}], "part of the type 'tool_result'"),
        ([{"type": "text", "text": None}], "part of the type 'text'"),
        ([7], "part of the type 'int'"),
        ({"text": "a"}, "must be a string or a list of text parts, but got a dict"),
        (7, "but got a int"),
        (None, "has no content"),
    ],
)
def test_content_that_is_not_text_is_refused(content, problem, chatml):
    _, ledger = encode({"messages": [user("Hi"), answer(content)]}, tokenizer=chatml, on_bad_row="skip")
    assert ledger.counts == {"dropped/wrong_type": 1}
    assert problem in ledger.examples["wrong_type"][0]


@pytest.mark.parametrize("content", ["", " \n", "\u200b", "<|im_end|>", [], [""], [{"type": "text", "text": "  "}]])
def test_emptiness_is_judged_on_content(content, chatml):
    for fields in (
        {"messages": [user("Hi"), answer(content)]},
        {"prompt": [user("Hi")], "response": [answer(content)]},
        {"prompt": [user("Hi")], "chosen": [answer("a")], "rejected": [answer(content)]},
    ):
        _, ledger = encode(fields, tokenizer=chatml, on_bad_row="skip")
        assert ledger.counts == {"dropped/empty_response": 1}
    # An empty answer that is not trained is a part of the conversation.
    chat = [user("Hi"), answer(""), user("Hello?"), answer("Yes.")]
    assert len(encode({"messages": chat}, tokenizer=chatml)[0]) == 1


def test_a_message_that_calls_a_tool_is_not_empty(chatml):
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    as_json = {"function": {**call["function"], "arguments": '{"city":"Rome"}'}}
    results = [
        encode({"messages": [user("Rome?"), answer(content, tool_calls=[tool_call], name=None)]}, tokenizer=chatml)[0]
        for content in (None, "")
        for tool_call in (call, as_json, {**call, "id": None})
    ]
    assert spell(chatml, results[0][0])[1] == '<call>get_weather {"city": "Rome"}</call><|im_end|>'
    assert all(result == results[0] for result in results)


def test_a_call_that_the_template_does_not_write_is_refused(tmp_path):
    call = {"function": {"name": "get_weather", "arguments": {}}}
    template = CHATML.replace("{% for c in m.tool_calls or [] %}", "{% for c in [] %}")
    chat = [user("Rome?"), answer("", tool_calls=[call]), {"role": "tool", "content": "sun"}, answer("Sunny.")]
    for tokenizer in (chat_tokenizer(template, tmp_path), ByteTokenizer()):
        _, ledger = encode({"messages": chat, "tools": TOOLS}, tokenizer=tokenizer, on_bad_row="skip")
        assert ledger.counts == {"dropped/chat_template": 1}
        assert "does not write the call of the tool 'get_weather'" in ledger.examples["chat_template"][0]


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{{ c.function.arguments | tojson }}", "{{ c.function.arguments + '' }}"),
        ("{{ c.function.arguments | tojson }}", "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"),
    ],
)
def test_arguments_are_given_as_the_template_expects_them(arguments, old, new, tmp_path):
    tokenizer = chat_tokenizer(CHATML.replace(old, new), tmp_path)
    call = {"function": {"name": "get_weather", "arguments": arguments}}
    (row,), _ = encode({"messages": [user("Rome?"), answer(None, tool_calls=[call])]}, tokenizer=tokenizer)
    expected = '{"city": "Rome"}' if "+" in new else "city=Rome"
    assert spell(tokenizer, row)[1] == f"<call>get_weather {expected}</call><|im_end|>"


def test_normalizing_twice_changes_nothing():
    chat = [user(["a", {"text": "b"}], name=None), answer(None, tool_calls=[{"function": {"name": "f"}}], weight=0.0)]
    once = normalize_messages(chat)
    assert normalize_messages(once) == once
    assert once[0] == user("ab")


def _random_row(numbers: random.Random) -> dict[str, Any]:
    """Make a row whose messages have some of many fields, in one order."""

    def maybe(name: str, value: Any) -> dict[str, Any]:
        return {name: value} if numbers.random() < 0.5 else {}

    def word() -> str:
        return numbers.choice(["sun", "rain", "é", "42", "<|im_end|>", "a b"])

    def call() -> dict[str, Any]:
        arguments = maybe("city", word()) | maybe("days", numbers.randint(1, 9)) | maybe("near", {"x": 0.5, **maybe("y", 2.0)})
        return maybe("id", word()) | {"type": "function", "function": {"name": word(), "arguments": arguments}}

    turns: list[dict[str, Any]] = [system(word())] if numbers.random() < 0.3 else []
    for _ in range(numbers.randint(1, 3)):
        turns.append({"role": "user", "content": word(), **maybe("name", word())})
        if numbers.random() < 0.5:
            turns.append({"role": "assistant", "tool_calls": [call() for _ in range(numbers.randint(1, 2))]})
            turns.append({"role": "tool", "content": word(), **maybe("tool_call_id", word())})
        said = {"role": "assistant", "content": f"x {word()} y", **maybe("weight", 1), **maybe("reasoning_content", word())}
        turns.append({**said, **maybe("meta", maybe("source", word()))})
    tool = {"type": "function", "function": {"name": word(), **maybe("description", word())}}
    return {"messages": turns, **maybe("tools", [tool]), **maybe("chat_template_kwargs", maybe("start", "s"))}


@pytest.mark.parametrize("seed", range(4))
def test_the_same_rows_give_the_same_ids_from_any_file(seed, chatml, tmp_path):
    numbers = random.Random(seed)
    rows = [_random_row(numbers) for _ in range(30)]
    # Content in parts, in all rows, because a column of an Arrow file has one type.
    if seed % 2:
        for row in rows:
            for message in row["messages"]:
                if "content" in message:
                    message["content"] = [{"type": "text", "text": message["content"]}]
    jsonl = write_jsonl(tmp_path / "rows.jsonl", rows)
    rows = [{"tools": None, "chat_template_kwargs": None} | row for row in rows]  # pyarrow takes the columns of the first row
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    sources = [
        [row.fields for row in read_rows(jsonl)],
        [row.fields for row in read_rows(str(tmp_path / "rows.parquet"))],
        [dict(row) for row in datasets.load_from_disk(str(tmp_path / "saved"))],
    ]
    assert sources[0] != sources[1]  # Arrow adds nulls
    for mask_turns in ("last_turn", "assistant_only", "all"):
        first, *others = (encode(*fields, tokenizer=chatml, mask_turns=mask_turns, max_length=10**5) for fields in sources)
        assert len(first[0]) == len(rows)
        for rows_of_source, ledger in others:
            assert rows_of_source == first[0]
            assert ledger.counts == first[1].counts and ledger.notes == first[1].notes
