import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from lightning_align.data.rows import Grader
from lightning_align.data.tasks.key_value import KeyValue

SMALL: dict[str, Any] = {"num_rows": 300, "num_keys": 50, "operands": [2, 3]}


def answer(task: KeyValue, prompt: str) -> str:
    """Compute the right response with Python's own arithmetic."""
    tag, expression = prompt[0], prompt[2:-1]
    numbers = re.sub(r"[a-z]+", lambda name: str(task.table[name[0]]), expression)
    return numbers if tag == "S" else str(eval(numbers))


@pytest.mark.parametrize("kind", ["subs", "num_math", "kv_math"])
@pytest.mark.parametrize("operations", ["+-", "+-*"])
def test_every_row_is_right(kind: str, operations: str) -> None:
    task = KeyValue(**SMALL, mix={kind: 1.0}, operations=operations)
    rows = list(task.rows())
    assert len(rows) == 300
    for row in rows:
        assert row["response"] == answer(task, row["prompt"])
        assert task.grade(**row)
        assert not task.grade(row["prompt"], row["response"] + "0")
        assert re.search("[a-z]", row["prompt"]) is None if kind == "num_math" else re.search("[0-9]", row["prompt"]) is None
    assert {len(re.findall(r"\w+", row["prompt"])) - 1 for row in rows} == {2, 3}
    assert isinstance(task, Grader)


def test_the_papers_example() -> None:
    task = KeyValue(num_keys=3, held_in=0.4)
    one, two, three = task.names() if task.keys == "all" else []
    task._table = {one: 10, two: 22, three: 24}
    assert task.grade(f"S {one}+{two}-{three}=", "10+22-24")
    assert task.grade(f"M {one}+{two}-{three}=", "8")
    assert task.grade("M 10+22-24=", "8")
    assert task.grade("M 2+3*4=", "14")


def test_parts_of_the_keys_are_disjoint() -> None:
    parts = {keys: KeyValue(keys=keys).names() for keys in ("held_in", "validation", "held_out")}  # type: ignore[arg-type]
    assert {name: len(part) for name, part in parts.items()} == {"held_in": 200, "validation": 100, "held_out": 700}
    assert len(set().union(*parts.values())) == 1000
    for keys, names in parts.items():
        task = KeyValue(200, keys=keys)  # type: ignore[arg-type]
        assert {name for row in task.rows() for name in re.findall(r"[a-z]+", row["prompt"])} <= set(names)
        assert task.table == KeyValue().table, "all parts share the table"


def test_no_key_is_a_prefix_of_another() -> None:
    names = sorted(KeyValue(num_keys=300, key_length=[1, 3]).table)
    assert not any(after.startswith(name) for name, after in pairwise(names))
    assert {len(name) for name in names} == {1, 2, 3}


def test_inline_rows_have_each_value_after_its_key() -> None:
    task = KeyValue(**SMALL, mix={"inline": 1.0})
    for row in task.rows():
        expression, _, numbers = row["response"].partition("=")
        found = re.findall(r"([a-z]+)([0-9]+)", expression)
        assert len(found) in (2, 3)
        assert all(task.table[key] == int(value) for key, value in found)
        assert numbers == (re.sub("[a-z]", "", expression) if row["prompt"] == "S " else "")


def test_copies_repeat_the_prompt() -> None:
    for row in KeyValue(**SMALL, mix={"copy_numbers": 1, "copy_letters": 1}).rows():
        assert row["prompt"] == f"S {row['response']}="


def test_letters_before_numbers_do_not_change_the_result() -> None:
    for row in KeyValue(**SMALL, mix={"lettered_math": 1}).rows():
        assert row["response"] == str(eval(re.sub("[a-z]", "", row["prompt"][2:-1])))


def test_mixtures_follow_their_weights() -> None:
    rows = list(KeyValue(2000, mix={"kv_math": 3, "num_math": 1}).rows())
    kinds = Counter(bool(re.search("[a-z]", row["prompt"])) for row in rows)
    assert 0.7 < kinds[True] / 2000 < 0.8
    assert rows == list(KeyValue(2000, mix={"kv_math": 3, "num_math": 1}).rows())
    assert rows != list(KeyValue(2000, mix={"kv_math": 3, "num_math": 1}, seed=1).rows())


def test_fingerprints_of_tasks_differ() -> None:
    tasks = [KeyValue(), KeyValue(seed=1), KeyValue(table_seed=1), KeyValue(keys="held_in"), KeyValue(mix={"subs": 1.0})]
    assert len({task.fingerprint for task in tasks}) == 5
    assert KeyValue().fingerprint == KeyValue(keys="all").fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0}, "`num_rows` .* at least 1, but got 0"),
        ({"mix": {"sums": 1.0}}, "`mix` .* positive weights of subs"),
        ({"mix": {"subs": 0.0}}, "`mix` of KeyValue"),
        ({"keys": "some"}, "`keys` .* one of all.* got some"),
        ({"num_keys": 500, "key_length": [1, 2]}, "`num_keys` .* 3 to 169 .* got 500"),
        ({"held_in": 0.95}, "`held_in` .* got 0.95"),
        ({"operands": []}, "`operands` of KeyValue"),
        ({"operations": "/"}, "`operations` .* got /"),
        ({"keys": "validation", "validation": 0.0}, "this part of the 1000 keys is empty"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyValue(**arguments)


def test_grading_another_prompt_is_an_error() -> None:
    task = KeyValue(num_keys=10)
    for prompt in ("M zzzzz+a=", "X 1+2=", "M 1+=", "1+2="):
        with pytest.raises(ValueError, match="`prompt` must be a question such as"):
            task.grade(prompt, "3")
