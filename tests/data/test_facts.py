import pytest

from lightning_align.data.tasks.facts import Facts, Role
from lightning_align.data.tokenizer import ByteTokenizer

SMALL = {"num_facts": 20, "num_held_out": 5, "num_notes": 7}


def texts(role: Role, **options: int) -> dict[str, str]:
    return {document.id: document.text for document in Facts(role, **SMALL, **options).documents()}


def test_each_question_has_its_fact_in_the_database_and_held_out_facts_are_not_in_training() -> None:
    database, train, held_out = texts("database"), texts("train"), texts("validation")
    assert (len(database), len(train), len(held_out)) == (25 + 7, 20, 5)
    for name, text in (train | held_out).items():
        key, value = name.removeprefix("question/"), text[15:]
        assert database[f"fact/{key}"] == f"{key}: {value}"
        assert text[:15] == f"{key}:".ljust(15) and value.isdigit() and len(value) == 8
    for name, text in held_out.items():
        assert not any(name.removeprefix("question/") in other or text[15:] in other for other in train.values())


def test_a_fact_is_one_chunk_and_a_value_begins_a_chunk() -> None:
    tokenizer = ByteTokenizer()
    for name, text in (texts("database") | texts("train")).items():
        (encoding,) = tokenizer.encode_batch([text])
        tokens = 2 + len(encoding.ids)  # with the first and last special token
        assert tokens <= 16 if name.startswith(("fact/", "note/")) else tokens == 16 + 8 + 1


def test_editions_differ_only_in_the_held_out_values() -> None:
    first, second = (Facts(num_facts=20, num_held_out=5, edition=edition).facts() for edition in (0, 1))
    assert first[:20] == second[:20]
    assert all(a[0] == b[0] and a[1] != b[1] for a, b in zip(first[20:], second[20:], strict=True))
    assert list(Facts("train").documents()) != list(Facts("database").documents())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "all"}, "`role` must be .*got 'all'"),
        ({"num_facts": 0}, "num_facts=0"),
        ({"num_notes": -1}, "num_notes=-1"),
        ({"num_facts": 300_000}, "no more keys"),
        ({"chunk_size": 15}, "must be at least 16"),
    ],
)
def test_wrong_argument_is_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Facts(**options)  # type: ignore[arg-type]
