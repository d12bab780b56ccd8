import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import auto_cli

from lightning_align.data.rows import Grader, RowTask, read_rows
from lightning_align.data.tasks.arithmetic import Arithmetic, judge_file, split_of, steps_right


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def steps(prompt: str) -> list[tuple[str, int]]:
    """Parse the signs and operands of a problem, independently of the code under test."""
    text = prompt.removesuffix("=")
    return [(text[i], int(text[i + 1 : i + 3])) for i in range(2, len(text), 3)]


def needs_borrow(prompt: str) -> list[bool]:
    # A forgotten borrow adds 10, so the last digit does not depend on earlier forgotten borrows.
    digit, found = int(prompt[1]), []
    for sign, operand in steps(prompt):
        found.append(sign == "-" and operand % 10 > digit)
        digit = (digit + (operand if sign == "+" else -operand)) % 10
    return found


@pytest.mark.parametrize(
    ("prompt", "response", "right"),
    [
        ("27+82-42=", "109,67", 2),
        ("52-17-11=", "35,24", 2),
        ("52-17-11=", "45,34", 1),  # a forgotten borrow, then a right step from the wrong result
        ("52-17-18=", "45,37", 0),  # both borrows forgotten
        ("52-17-11=", "45,24", 0),  # the right last result, but not from the result before it
        ("52-17-11=", "35", 1),
        ("52-17-11=", "", 0),
        ("52-17-11=", "35,", 1),
        ("52-17-11=", "x,24", 0),
        ("52-17-11=", "035,24", 0),
        ("52-17-11=", " 35,24", 0),
        ("52-17-11=", "٣٥,24", 0),  # digits, but not ASCII
        ("52-17-11=", "9" * 10_000 + ",24", 0),
        ("10-10=", "0", 1),
    ],
)
def test_steps_by_hand(prompt: str, response: str, right: int) -> None:
    num_steps = len(steps(prompt))
    assert steps_right(prompt, response) == (right, num_steps)
    assert Arithmetic(1).grade(prompt, response) == (right == num_steps)


@pytest.mark.parametrize("response", ["35,24,", "35,24,13", "35,24\n", "35,24=", "35, 24", "35;24"])
def test_right_steps_in_a_wrong_format_are_not_right(response: str) -> None:
    assert not Arithmetic(1).grade("52-17-11=", response)


@pytest.mark.parametrize("prompt", ["", "52-17-11", "5-3=", "52=", "052-17=", "52*17=", "52-17=35", "52-17=\n"])
def test_prompt_of_another_task_is_an_error(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"`prompt` must be a problem such as"):
        steps_right(prompt, "1")


@pytest.mark.parametrize("num_operands", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_clean_demonstrations_are_right(seed: int, num_operands: int) -> None:
    task = Arithmetic(300, seed=seed, num_operands=num_operands)
    rows = list(task.rows())
    assert len({row["prompt"] for row in rows}) == 300
    for row in rows:
        values = list(map(int, row["response"].split(",")))
        exact = list(
            itertools.accumulate(
                (operand if sign == "+" else -operand for sign, operand in steps(row["prompt"])),
                initial=int(row["prompt"][:2]),
            )
        )
        assert values == exact[1:] and min(values) >= 0 and len(values) == num_operands - 1
        assert all(10 <= operand <= 99 for _, operand in steps(row["prompt"]))
        assert task.grade(row["prompt"], row["response"])


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_borrows_are_forgotten_with_the_given_probability(rate: float) -> None:
    task = Arithmetic(4000, seed=3, forget_borrow=rate)
    chances = forgotten = 0
    for row in task.rows():
        right, num_steps = steps_right(row["prompt"], row["response"])
        forgotten += num_steps - right
        chances += sum(needs_borrow(row["prompt"]))
        assert task.grade(row["prompt"], row["response"]) == (right == num_steps)
    # All errors are forgotten borrows, and their number is binomial. The tolerance is four standard deviations.
    assert chances > 1000
    assert abs(forgotten - rate * chances) < 4 * math.sqrt(chances * rate * (1 - rate))


def test_every_forgotten_borrow_adds_ten() -> None:
    clean, sloppy = Arithmetic(500).rows(), Arithmetic(500, forget_borrow=1.0).rows()
    for right, wrong in zip(clean, sloppy, strict=True):
        assert right["prompt"] == wrong["prompt"]
        slips = list(itertools.accumulate(10 * borrow for borrow in needs_borrow(right["prompt"])))
        exact = map(int, right["response"].split(","))
        assert wrong["response"] == ",".join(str(value + slip) for value, slip in zip(exact, slips, strict=True))


def test_about_a_quarter_of_the_problems_need_a_borrow() -> None:
    share = sum(any(needs_borrow(row["prompt"])) for row in Arithmetic(4000).rows()) / 4000
    assert 0.23 < share < 0.31


def test_splits_are_disjoint_for_all_seeds() -> None:
    prompts = {
        split: {row["prompt"] for seed in range(3) for row in Arithmetic(800, seed=seed, split=split).rows()}
        for split in ("train", "validation", "test")
    }
    for split, own in prompts.items():
        assert {split_of(prompt) for prompt in own} == {split}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values()))


def test_splits_have_their_shares_of_all_two_operand_problems() -> None:
    problems = [f"{a}{sign}{b}=" for a in range(10, 100) for b in range(10, 100) for sign in "+-"]
    shares = Counter(map(split_of, problems))
    assert abs(shares["train"] / len(problems) - 0.8) < 0.02
    assert abs(shares["test"] / len(problems) - 0.1) < 0.02


def test_rows_are_reproducible_and_fingerprints_differ() -> None:
    task = Arithmetic(50, forget_borrow=0.5)
    assert list(task.rows()) == list(task.rows()) == list(Arithmetic(50, forget_borrow=0.5).rows())
    others = [
        Arithmetic(51, forget_borrow=0.5),
        Arithmetic(50, forget_borrow=0.4),
        Arithmetic(50, forget_borrow=0.5, seed=1),
        Arithmetic(50, forget_borrow=0.5, num_operands=4),
        Arithmetic(50, forget_borrow=0.5, split="test"),
    ]
    assert len({other.fingerprint for other in [task, *others]}) == 6
    assert all(list(other.rows()) != list(task.rows()) for other in others)
    assert task.fingerprint == Arithmetic(50, forget_borrow=0.5).fingerprint
    assert [row.fields for row in read_rows(task)] == list(task.rows())
    assert isinstance(task, Grader)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_rows": 0},
        {"forget_borrow": 1.5},
        {"forget_borrow": math.nan},
        {"num_operands": 1},
        {"split": "dev"},
    ],
)
def test_wrong_argument_is_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^`{next(iter(arguments))}` must be .*but got"):
        Arithmetic(**{"num_rows": 5, **arguments})


def test_more_rows_than_problems_is_named() -> None:
    with pytest.raises(ValueError, match=r"`num_rows` must be at most about 1\d\d\d with split='test'.*got 5000"):
        list(Arithmetic(5000, num_operands=2, split="test").rows())


SAMPLES: list[dict[str, Any]] = [
    {"row": 0, "prompt": "52-17-11=", "responses": ["45,34", "35,24", "45,24"]},
    {"row": 1, "prompt": "27+82-42=", "responses": ["109,67", "109,67"]},
    {"row": 2, "prompt": "52-17-18=", "responses": ["45,37", "45,27"]},
    {"row": 3, "prompt": "10+10+10=", "responses": ["20,30", "20,30,40"]},
    {"row": 4, "prompt": "10+10+11=", "responses": [""]},
    {"row": 5, "prompt": "10+10+12=", "responses": ["", "20,32"]},
    {"row": 6, "prompt": "10+10+13=", "responses": ["", "20,33", "33"]},
]
PAIRS = [
    {"prompt": "52-17-11=", "chosen": "35,24", "rejected": "45,34"},
    {"prompt": "10+10+10=", "chosen": "20,30", "rejected": "20,30,40"},
    {"prompt": "10+10+13=", "chosen": "20,33", "rejected": "33"},
]
WINNERS = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in PAIRS]


def test_judge_by_hand() -> None:
    counts: Counter[str] = Counter()
    assert list(Arithmetic(1).judge(SAMPLES, counts=counts)) == PAIRS
    assert counts == {"pairs": 3, "all right": 1, "all wrong": 2, "all right or empty": 1}
    assert list(Arithmetic(1).judge(SAMPLES, form="winners")) == WINNERS


def test_judge_file_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    preferences, winners = tmp_path / "new" / "pairs.jsonl", tmp_path / "winners.jsonl"
    judge_file(Arithmetic(1), samples=samples, preferences=str(preferences), winners=str(winners))
    assert read_jsonl(preferences) == PAIRS
    assert read_jsonl(winners) == WINNERS
    printed = capsys.readouterr().out
    assert (
        "7 prompts: 3 pairs, 1 with every response right, 2 with every response wrong, 1 with every response right or"
        in printed
    )
    assert str(preferences) in printed and str(winners) in printed
    judge_file(Arithmetic(1), samples=samples, preferences=str(preferences))
    assert read_jsonl(preferences) == PAIRS
    assert {path.name for path in tmp_path.rglob("*.*")} == {"samples.jsonl", "pairs.jsonl", "winners.jsonl"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "10+10="}, r"samples.jsonl:2 has prompt='10\+10=' and responses=None, expected"),
        ({"prompt": "10+10=", "responses": "20"}, r"samples.jsonl:2 has .* expected"),
        ({"prompt": "10+10=", "responses": []}, r"samples.jsonl:2 has .* expected"),
        ({"prompt": "10+10=", "responses": [20]}, r"samples.jsonl:2 has .* expected"),
        ({"prompt": "hello", "responses": ["20"]}, r"samples.jsonl:2: `prompt` must be a problem .* got 'hello'"),
        ([], r"samples.jsonl:2 is a JSON list"),
    ],
)
def test_bad_sample_row_is_named_and_nothing_is_written(tmp_path: Path, row: Any, message: str) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", [SAMPLES[0], row])
    with pytest.raises(ValueError, match=message):
        judge_file(Arithmetic(1), samples=samples, preferences=str(tmp_path / "pairs.jsonl"))
    assert not (tmp_path / "pairs.jsonl").exists()


def test_no_pair_is_an_error(tmp_path: Path) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES[1:3])
    with pytest.raises(ValueError, match=r"has 2 prompts: 0 pairs, 1 with every response right.*more responses"):
        judge_file(Arithmetic(1), samples=samples, preferences=str(tmp_path / "pairs.jsonl"))


def test_output_to_the_samples_file_is_an_error(tmp_path: Path) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    with pytest.raises(ValueError, match="must be different files"):
        judge_file(Arithmetic(1), samples=samples, preferences=str(tmp_path / "x" / ".." / "samples.jsonl"))
    assert read_jsonl(tmp_path / "samples.jsonl") == SAMPLES


def test_task_that_cannot_grade_is_an_error(tmp_path: Path) -> None:
    class Mute(RowTask):
        fingerprint = "mute"

        def rows(self):
            yield {}

    with pytest.raises(ValueError, match=r"`task` must have a method grade.*Mute"):
        judge_file(Mute(), samples="samples.jsonl", preferences=str(tmp_path / "pairs.jsonl"))


def test_judge_file_is_a_command(tmp_path: Path) -> None:
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    task = [f"--task={Arithmetic.__module__}.Arithmetic", "--task.num_rows=1"]
    files = [f"--samples={samples}", f"--preferences={tmp_path}/pairs.jsonl"]
    auto_cli(judge_file, as_positional=False, args=[*task, *files])
    assert read_jsonl(tmp_path / "pairs.jsonl") == PAIRS
