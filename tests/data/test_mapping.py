import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_align.data.files import Row
from lightning_align.data.ledger import Ledger
from lightning_align.data.mapping import RowMapping, map_rows
from lightning_align.data.rows import read_rows
from tests.data.helpers import write_jsonl

SFT = ("response", "messages", "text")
PAIRS = ("pair",)


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


def _system(text):
    return {"role": "system", "content": text}


def _map(*fields, accepted=PAIRS, on_bad_row="fail", prompts_only=False, **settings):
    ledger = Ledger("test", on_bad_row=on_bad_row)
    rows = (Row(row, f"t:{number}") for number, row in enumerate(fields, start=1))
    mapped = map_rows(rows, RowMapping(**settings), accepted=accepted, prompts_only=prompts_only, ledger=ledger)
    return list(mapped), ledger


def _fields(*fields, **settings):
    return [row.fields for row in _map(*fields, **settings)[0]]


PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
NECTAR = {"prompt": "q", "answers": [{"answer": text, "rank": rank} for text, rank in (("b", 2.0), ("c", 3.0), ("a", 1.0))]}
PUBLIC = [
    # ShareGPT, and with preferences as LLaMA-Factory has them
    (
        SFT,
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s", "tools": "t"},
        {"messages": [_system("s"), _user("q"), _assistant("a")], "tools": "t"},
    ),
    (SFT, {"conversations": [_user("q"), _assistant("a")], "system": ""}, {"messages": [_user("q"), _assistant("a")]}),
    (
        PAIRS,
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"prompt": [_user("q")], "chosen": [_assistant("good")], "rejected": [_assistant("bad")]},
    ),
    # Alpaca, with the joined text of the original, and with a system message and a history
    (SFT, {"instruction": "i", "input": "x", "output": "a", "text": "all"}, {"text": "all", "prompt": "i\nx", "response": "a"}),
    (SFT, {"instruction": "i", "input": "", "output": "a"}, {"prompt": "i", "response": "a"}),
    (
        SFT,
        {"instruction": "i", "input": None, "output": "a", "system": "s", "history": [["q", "b"]]},
        {"prompt": [_system("s"), _user("q"), _assistant("b"), _user("i")], "response": "a"},
    ),
    (SFT, {"instruction": "i", "output": "a", "system": ""}, {"prompt": [_user("i")], "response": "a"}),
    # TRL
    (SFT, {"prompt": "q", "completion": "a"}, {"prompt": "q", "response": "a"}),
    (SFT, {"prompt": [_user("q")], "completion": [_assistant("a")]}, {"prompt": [_user("q")], "response": [_assistant("a")]}),
    # Orca pairs
    (
        PAIRS,
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [_system("s"), _user("q")], "chosen": "good", "rejected": "bad"},
    ),
    (PAIRS, {"question": "q", "chosen": "good", "rejected": "bad"}, PAIR),
    (PAIRS, {"instruction": "q", "input": "x", "chosen": "good", "rejected": "bad"}, PAIR | {"prompt": "q\nx"}),
    # UltraFeedback binarized and HH-RLHF have the forms already
    (PAIRS, PAIR | {"chosen": [_user("q"), _assistant("a")], "score_chosen": 8.0}, None),
    (PAIRS, {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, None),
    # summarize-from-feedback, SHP, HelpSteer 2 and 3, PKU-SafeRLHF, AlpacaFarm, Chatbot Arena
    (PAIRS, {"info": {"id": "x", "post": "q"}, "summaries": [{"text": "bad"}, {"text": "good"}], "choice": 1}, PAIR),
    (
        PAIRS,
        {"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "post_id": "x"},
        PAIR | {"post_id": "x"},
    ),
    (PAIRS, {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}, PAIR),
    (PAIRS, {"prompt": "q", "response_1": "good", "response_2": "bad", "preference_strength": -2}, PAIR),
    (PAIRS, {"prompt": "q", "response_1": "bad", "response_2": "good", "preference_strength": 1}, PAIR),
    (
        PAIRS,
        {"context": [_user("q")], "response1": "good", "response2": "bad", "overall_preference": -1},
        PAIR | {"prompt": [_user("q")]},
    ),
    (PAIRS, {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1}, PAIR),
    (PAIRS, {"instruction": "q", "input": "", "output_1": "bad", "output_2": "good", "preference": 2}, PAIR),
    (
        PAIRS,
        {
            "conversation_a": [_user("q"), _assistant("bad")],
            "conversation_b": [_user("q"), _assistant("good")],
            "winner": "model_b",
        },
        {"chosen": [_user("q"), _assistant("good")], "rejected": [_user("q"), _assistant("bad")]},
    ),
    # Nectar, and the completions of UltraFeedback
    (PAIRS, NECTAR, {"prompt": "q", "chosen": "a", "rejected": "c"}),
    (
        PAIRS,
        {
            "instruction": "q",
            "completions": [{"response": "bad", "overall_score": 3.0}, {"response": "good", "overall_score": 7.5}],
        },
        PAIR,
    ),
]


@pytest.mark.parametrize("number", range(len(PUBLIC)))
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_public_rows_are_found_on_their_own(tmp_path, number, kind):
    accepted, row, expected = PUBLIC[number]
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    if kind == "parquet":
        # A table has the columns of all its rows, null where a row has none.
        table = pa.Table.from_pylist([row])
        for name in sorted({name for _, other, _ in PUBLIC for name in other} - set(row)):
            table = table.append_column(name, pa.nulls(1))
        pq.write_table(table, tmp_path / "rows.parquet")
        path = str(tmp_path / "rows.parquet")
    (mapped,) = map_rows(read_rows(path), RowMapping(), accepted=accepted)
    assert {name: value for name, value in mapped.fields.items() if value is not None} == (
        row if expected is None else expected
    )


@pytest.mark.parametrize(
    ("ranked_pairs", "expected"), [("best_worst", ["ac"]), ("adjacent", ["ab", "bc"]), ("all", ["ab", "ac", "bc"])]
)
def test_pairs_of_a_ranked_row(ranked_pairs, expected):
    lists = {"prompt": "q", "responses": ["c", "a", "b"], "scores": ["0.5", 2, 1]}
    for row in (NECTAR, lists):
        mapped, ledger = _map(row, ranked_pairs=ranked_pairs)
        assert [row.fields["chosen"] + row.fields["rejected"] for row in mapped] == expected
        assert {row.origin for row in mapped} == {"t:1"}
        assert all(set(row.fields) == {"prompt", "chosen", "rejected"} for row in mapped)
        assert ledger.notes == {"shape_ranked": 1}


def test_answers_of_equal_rank_are_no_pairs_and_no_error():
    answers = [{"answer": text, "score": score} for text, score in (("a", 2), ("b", 2), ("c", 1))]
    mapped = _fields({"prompt": "q", "answers": answers}, ranked_pairs="all")
    assert [row["chosen"] + row["rejected"] for row in mapped] == ["ac", "bc"]
    rows = [
        {"prompt": "q", "answers": answers[:2]},
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
        {"conversation_a": [_user("q")], "conversation_b": [_user("q")], "winner": "tie (bothbad)"},
    ]
    mapped, ledger = _map(*rows, PAIR)
    assert [row.fields for row in mapped] == [PAIR]
    assert ledger.counts == {"dropped/tied": 3}


def test_labelled_rows_of_one_prompt_become_pairs():
    def row(prompt, answer, label):
        return {"prompt": prompt, "completion": answer, "label": label, "id": answer}

    rows = [row("p", "1", True), row("q", "2", False), row("p", "3", True), row("p", "4", False), row("q", "5", True)]
    mapped, ledger = _map(*rows, row("p", "6", "0"), row("r", "7", False))
    found = [
        (row.fields["prompt"], row.fields["chosen"], row.fields["rejected"], row.fields["id"], row.origin) for row in mapped
    ]
    expected = [
        ("p", "1", "4", "1", "t:1 with t:4"),
        ("q", "5", "2", "5", "t:5 with t:2"),
        ("p", "3", "6", "3", "t:3 with t:6"),
    ]
    assert found == expected
    assert ledger.counts == {"dropped/unpaired": 1}
    assert ledger.examples["unpaired"] == ["t:7 has no answer of another label for its prompt"]


def test_bad_answers_are_never_taken_for_demonstrations():
    good = {"prompt": "p", "completion": "a", "label": True}
    for bad in (
        {"prompt": "p", "completion": "a", "label": False},
        {"prompt": "p", "completion": "a", "label": 0},
        {"prompt": "p", "response": "a", "label": "False"},
        {"messages": [_user("q"), _assistant("a")], "kto_tag": False},
    ):
        with pytest.raises(ValueError, match="t:1 is labelled as a bad answer"):
            _map(bad, accepted=SFT)
        mapped, ledger = _map(bad, good, accepted=SFT, on_bad_row="skip")
        assert [row.fields for row in mapped] == [{"prompt": "p", "response": "a", "label": True}]
        assert ledger.counts == {"dropped/bad_answer": 1}
        assert _fields(bad, accepted=SFT, shape="plain") == [bad]
    classes = {"prompt": "p", "response": "a", "label": 0}
    assert _fields(classes, accepted=SFT) == [classes]
    assert _fields({**good, "label": False}, accepted=("prompt",), prompts_only=True)[0]["prompt"] == "p"


def test_answers_with_a_grade_in_rows_of_their_own():
    """As in HelpSteer: several answers of one prompt, each with ratings."""
    rows = [{"prompt": "p", "response": text, "helpfulness": grade} for text, grade in (("a", 4), ("b", 4), ("c", 1), ("d", 2))]
    settings = {"shape": "labelled", "columns": {"label": "helpfulness"}}
    mapped, ledger = _map(*rows, **settings)
    assert [row.fields for row in mapped] == [
        {"prompt": "p", "chosen": "a", "rejected": "c"},
        {"prompt": "p", "chosen": "b", "rejected": "d"},
    ]
    assert not ledger.counts


def test_a_message_of_a_tree_is_not_a_text():
    row = {"message_id": "1", "parent_id": "0", "text": "Yes", "role": "assistant"}
    with pytest.raises(ValueError, match="is one message of a tree of messages"):
        _map(row, accepted=SFT)
    assert _fields(row, accepted=SFT, shape="plain") == [row]
    assert _fields({"text": "Yes", "role": "x"}, accepted=SFT) == [{"text": "Yes", "role": "x"}]


def test_other_layouts_of_conversations():
    """Texts that alternate (LIMA), exchanges (Capybara), and the system message beside strings."""
    expected = [{"messages": [_user("q"), _assistant("a"), _user("r"), _assistant("b")]}]
    assert _fields({"conversations": ["q", "a", "r", "b"]}, accepted=SFT) == expected
    turns = [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]
    assert _fields({"conversation": turns}, accepted=SFT) == expected
    turns[0]["system"] = "s"
    assert _fields({"conversation": turns}, accepted=SFT)[0]["messages"][0] == _system("s")
    row = {"system": "s", "prompt": "q", "response": "a", "chosen": "a", "rejected": "b"}
    given = [_system("s"), _user("q")]
    assert _fields(row)[0] == {"prompt": given, "response": "a", "chosen": "a", "rejected": "b"}
    assert _fields({"system": "s", "prompt": "q", "response": "a"}, accepted=SFT) == [{"prompt": given, "response": "a"}]
    assert _fields({"system": "s", "prompt": "q"}, accepted=("prompt",))[0]["prompt"] == given
    untouched = {"system": None, "prompt": "q", "response": "a"}
    assert _fields(untouched, accepted=SFT) == [untouched]
    dolly = {"instruction": "i", "context": "x", "response": "a", "category": "c"}
    assert _fields(dolly, accepted=SFT) == [{"prompt": "i\nx", "response": "a", "category": "c"}]


def test_columns_are_renamed_and_the_others_stay():
    row = {"instruction": "i", "output": "o", "meta": {"topic": {"name": "x"}}, "weight": 2}
    (mapped,) = _fields(row, accepted=SFT, columns={"prompt": "meta.topic.name", "response": "output"})
    assert mapped == {"instruction": "i", "meta": row["meta"], "weight": 2, "prompt": "x", "response": "o"}
    (mapped,) = _fields({"a.b": "x", "prompt": "y"}, accepted=SFT, columns={"prompt": "a.b", "response": "prompt"})
    assert mapped == {"prompt": "x", "response": "y"}
    (mapped,) = _fields({"a": None}, accepted=SFT, columns={"prompt": "a.b"})
    assert mapped == {"a": None, "prompt": None}


def test_columns_of_lists_of_structs():
    row = {"q": "q", "outputs": [{"said": "bad", "stars": 1}, {"said": "good", "stars": 5}]}
    columns = {"prompt": "q", "answers": "outputs.said", "scores": "outputs.stars"}
    assert _fields(row, columns=columns) == [PAIR | {"outputs": row["outputs"]}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "promt"}, r"t:2 has no column 'promt', which `columns` names\. The columns are: prompt, info"),
        ({"prompt": "info.pst"}, r"has no column 'pst' in 'info', .*The columns are: post"),
        ({"prompt": "prompt.x"}, r"has no column 'prompt\.x', .*'a' has no columns"),
    ],
)
def test_an_unknown_column_lists_the_columns(columns, message):
    good = {"prompt": {"x": "a"}, "info": {"post": "b", "pst": "c"}, "promt": ""}
    with pytest.raises(ValueError, match=message):
        _map(good, {"prompt": "a", "info": {"post": "b"}}, accepted=SFT, columns=columns)


def test_prompts_need_no_columns_of_responses():
    columns = {"prompt": "question", "response": "reply", "chosen": "best"}
    assert _fields({"question": "q"}, accepted=("prompt",), prompts_only=True, columns=columns) == [{"prompt": "q"}]
    with pytest.raises(ValueError, match="no column 'question'"):
        _map({"reply": "q"}, accepted=("prompt",), prompts_only=True, columns=columns)
    assert _fields({"instruction": "i", "input": "x"}, accepted=("prompt",))[0]["prompt"] == "i\nx"


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        (
            {"columns": {"answer_1": "x", "answer_2": "y", "choice": "best"}},
            {"prompt": "q", "x": "bad", "y": "good", "best": "2"},
        ),
        (
            {"columns": {"answer_0": "x", "answer_1": "y", "choice": "best"}},
            {"prompt": "q", "x": "good", "y": "bad", "best": False},
        ),
        (
            {"columns": {"answer_a": "x", "answer_b": "y", "choice": "best"}},
            {"prompt": "q", "x": "bad", "y": "good", "best": "B"},
        ),
        ({"columns": {"prompt": "a.b"}}, {"a": {"b": "q"}, "answers": ["bad", "good"], "choice": 1}),
        (
            {"shape": "choice", "columns": {"choice": "best"}},
            {"question": "q", "answers": [{"text": "good"}, "bad"], "best": 0},
        ),
    ],
)
def test_choices_with_names_of_their_own(settings, row):
    (mapped,) = _fields(row, **settings)
    assert {name: mapped[name] for name in PAIR} == PAIR


def test_roles():
    said = [{"from": "visitor", "value": "q", "weight": None}, {"from": "expert", "value": "a", "weight": 0}]
    with pytest.raises(ValueError, match=r"t:1 has a message from 'visitor'\. Give its role .*such as visitor: user"):
        _map({"conversations": said}, accepted=SFT)
    roles = {"visitor": "user", "expert": "assistant"}
    expected = [{"messages": [_user("q"), _assistant("a") | {"weight": 0}]}]
    assert _fields({"conversations": said}, accepted=SFT, roles=roles) == expected
    renamed = [{"role": "visitor", "content": "q"}, {"role": "expert", "content": "a", "weight": 0}]
    assert _fields({"messages": renamed}, accepted=SFT, roles=roles) == expected
    assert _fields({"messages": renamed}, accepted=SFT) == [{"messages": renamed}]
    pair = {"prompt": [{"role": "human", "content": "q"}], "chosen": [{"role": "gpt", "content": "a"}], "rejected": "b"}
    assert _fields(pair)[0] == {"prompt": [_user("q")], "chosen": [_assistant("a")], "rejected": "b"}


def test_a_named_shape_that_a_row_lacks():
    for shape, message in (
        (
            "sharegpt",
            r"t:1 has no column 'conversations' or .*which the shape 'sharegpt' needs \(it has 'text'\)",
        ),
        ("alpaca", "no column 'prompt' or 'instruction'"),
        ("ranked", "a list 'answers'"),
        ("labelled", "no column 'label'"),
        ("choice", "'answer_0', 'answer_1' and 'choice'"),
    ):
        with pytest.raises(ValueError, match=message):
            _map({"text": "x"}, shape=shape)
    with pytest.raises(ValueError, match=r"has 7 in column 'choice', which names neither answer"):
        _map({"prompt": "q", "answers": ["a", "b"], "choice": 7})
    with pytest.raises(ValueError, match=r"has 'maybe' in column .label., expected true .good. or false .bad., or a number"):
        _map({"prompt": "q", "completion": "a", "label": "maybe"}, shape="labelled")
    for name in ("shape", "ranked_pairs"):
        with pytest.raises(ValueError, match=rf"`{name}` must be one of .*, but got 'x'"):
            RowMapping(**{name: "x"})


def test_plain_takes_rows_as_they_are():
    row = {"instruction": "i", "output": "a", "text": "all"}
    assert _fields(row, accepted=SFT, shape="plain") == [row]


def test_rows_that_cannot_be_mapped_are_counted():
    mapped, ledger = _map({"conversations": [{"from": "x", "value": "q"}]}, PAIR, accepted=SFT, on_bad_row="skip")
    assert [row.fields for row in mapped] == [PAIR]
    assert ledger.counts == {"dropped/unknown_role": 1}
