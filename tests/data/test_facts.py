import pytest

from lightning_align.data.tasks.facts import Facts
from lightning_align.data.tokenizer import ByteTokenizer

SMALL = {"num_facts": 20, "num_held_out": 5}


def test_each_held_out_question_has_its_fact_in_the_database_and_no_question_there() -> None:
    database = {document.id: document.text for document in Facts("database", **SMALL).documents()}
    questions = {document.id: document.text for document in Facts("questions", **SMALL).documents()}
    assert len(database) == 25 + 20 and len(questions) == 5 and not database.keys() & questions.keys()
    for name, text in questions.items():
        key, value = name.removeprefix("question/"), text[31:]
        assert database[f"fact/{key}"] == f"Code of {key} is {value}."
        assert text[:31] == f"Code of {key} is".ljust(31) and value.isdigit() and len(value) == 8


def test_some_questions_of_the_training_find_the_fact_of_another_key() -> None:
    names = {document.id for document in Facts("database", unanswered=0.25, **SMALL).documents()}
    asked = {name.removeprefix("question/") for name in names if name.startswith("question/")}
    told = {name.removeprefix("fact/") for name in names if name.startswith("fact/")}
    assert len(asked) == 20 and len(told) == 25 and len(asked - told) == 5
    assert {key.split()[1] for key in asked} < {key.split()[1] for key in told}


def test_a_fact_is_one_chunk_and_a_value_begins_a_chunk() -> None:
    tokenizer = ByteTokenizer()
    for document in Facts("database", **SMALL).documents():
        (encoding,) = tokenizer.encode_batch([document.text])
        tokens = 2 + len(encoding.ids)  # with the beginning and the end of the document
        assert tokens <= 32 if document.id.startswith("fact/") else tokens == 32 + 8 + 1


def test_editions_differ_in_the_held_out_values_alone() -> None:
    first, second = (Facts(num_facts=20, num_held_out=5, edition=edition).facts() for edition in (0, 1))
    assert first[:20] == second[:20]
    assert all(a[0] == b[0] and a[1] != b[1] for a, b in zip(first[20:], second[20:], strict=True))
    assert Facts(edition=0).fingerprint != Facts(edition=1).fingerprint
    assert Facts("questions").fingerprint != Facts("database").fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "all"}, "role='all'"),
        ({"num_facts": 0}, "num_facts=0"),
        ({"num_facts": 9_000}, "no more places"),
        ({"unanswered": 1.0}, "unanswered=1.0"),
        ({"chunk_size": 31}, "expected 32 or more"),
    ],
)
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Facts(**options)  # type: ignore[arg-type]
