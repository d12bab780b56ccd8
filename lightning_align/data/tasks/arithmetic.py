"""Worked sums: demonstrations that can be careless, answers that can be checked, and preferences that follow from it.

The prompt ``"27+82-42="`` asks for the running results, ``"109,67"``. In careless demonstrations a subtraction that
needs a borrow forgets it, which makes the result 10 too big, and the error is carried on: ``"52-17-11="`` becomes
``"45,34"``. A model that imitates them is wrong where its teacher was; a judge of its samples can teach it better.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_align.data.rows import Grader, Row, RowTask, read_rows
from lightning_align.runtime.files import publish_text

Split = Literal["train", "validation", "test"]

_RULES = 1
"""Goes into the fingerprint: raise it when the same arguments come to mean other rows."""
_PROMPT = re.compile(r"[1-9][0-9](?:[+-][1-9][0-9])+=")
# A number as Python would print it. The bound on its length keeps a runaway response from becoming a huge integer.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_MAX_REPEATS = 50_000
"""So many draws in a row without a new problem mean that there are none left, or next to none."""


class Arithmetic(RowTask):
    """Sums and differences of two-digit numbers, answered by their running results.

    No intermediate result is negative, and no problem appears twice. The three splits share no problem, whatever the
    seeds: the text of a problem alone decides which one it belongs to (8 in 10 to ``train``, 1 each to the others).

    Args:
        num_rows: Number of rows.
        seed: Chooses the problems and, independently of them, the steps at which a borrow is forgotten.
        forget_borrow: Probability that a subtraction which needs a borrow forgets it. 0 gives right demonstrations; the
            prompts are the same at every value.
        num_operands: Numbers in a problem, 2 or more; a response has one result fewer.
        split: Which of the three disjoint sets of problems to draw from.
    """

    def __init__(
        self,
        num_rows: int = 1000,
        *,
        seed: int = 0,
        forget_borrow: float = 0.0,
        num_operands: int = 3,
        split: Split = "train",
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows={num_rows}: expected 1 or more; say how many problems to draw")
        if not 0 <= forget_borrow <= 1:
            raise ValueError(f"forget_borrow={forget_borrow}: expected a probability; give a number from 0 to 1")
        if num_operands < 2:
            raise ValueError(f"num_operands={num_operands}: expected 2 or more; a sum needs two numbers")
        if split not in get_args(Split):
            raise ValueError(f"split={split!r}: expected one of {', '.join(get_args(Split))}; choose one of them")
        self.num_rows = num_rows
        self.seed = seed
        self.forget_borrow = forget_borrow
        self.num_operands = num_operands
        self.split: Split = split

    @property
    def fingerprint(self) -> str:
        """The arguments, and the number of the rules by which they make rows."""
        return json.dumps({"rules": _RULES} | vars(self), sort_keys=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields ``{"prompt", "response"}``."""
        # Two generators, so that careless and careful demonstrations are of the same problems.
        slips = random.Random(f"slips {self.seed}")
        for prompt in self._prompts(random.Random(f"problems {self.seed}")):
            yield {"prompt": prompt, "response": _work_out(prompt, slips, forget_borrow=self.forget_borrow)}

    def grade(self, prompt: str, response: str) -> bool:
        """Says whether a response is fully right: every step, and nothing but the steps.

        Raises:
            ValueError: If the prompt is no problem of this task.
        """
        right, num_steps = steps_right(prompt, response)
        return right == num_steps == response.count(",") + 1

    def judge(
        self,
        samples: Iterable[Mapping[str, Any]],
        *,
        form: Literal["preferences", "winners"] = "preferences",
        counts: Counter[str] | None = None,
    ) -> Iterator[dict[str, str]]:
        """Yields what `judge` makes of the samples.

        Args:
            samples: Rows ``{"prompt": str, "responses": [str, ...]}``.
            form: ``"preferences"`` for rows ``{"prompt", "chosen", "rejected"}``, ``"winners"`` for the chosen
                responses of the same prompts alone, as rows ``{"prompt", "response"}``.
            counts: Is told what became of every sample row.

        Raises:
            ValueError: If a row has another form or its prompt is no problem of this task.
        """
        for number, fields in enumerate(samples, start=1):
            pair = judge(self, Row(dict(fields), f"samples, row {number}"), counts=counts)
            if pair is not None:
                yield pair if form == "preferences" else _winner(pair)

    def _prompts(self, generator: random.Random) -> Iterator[str]:
        """Yields the problems of this task's split, each once."""
        seen: set[str] = set()
        repeats = 0
        while len(seen) < self.num_rows:
            prompt = _draw(generator, num_operands=self.num_operands)
            if prompt in seen or split_of(prompt) != self.split:
                repeats += 1
                if repeats == _MAX_REPEATS:
                    raise ValueError(
                        f"num_rows={self.num_rows}: expected at most about {len(seen)}, for split={self.split!r} has no"
                        f" more problems of num_operands={self.num_operands}; ask for fewer rows or more operands"
                    )
                continue
            repeats = 0
            seen.add(prompt)
            yield prompt


def split_of(prompt: str) -> Split:
    """The split that a problem belongs to, by a hash of its text."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def steps_right(prompt: str, response: str) -> tuple[int, int]:
    """Counts the right steps of a response.

    Each step is checked from the value written before it, so an error costs the step it was made in and not the ones
    that carry it on. A step that was not written, is not a plain number, or starts from what is none, is wrong.

    Args:
        prompt: A problem, such as ``"27+82-42="``.
        response: What was answered, right if it is ``"109,67"``.

    Returns:
        The number of right steps, and the number of steps that the problem has.

    Raises:
        ValueError: If the prompt is no problem of this task.
    """
    value, steps = _parse(prompt)
    before: int | None = value
    right = 0
    # Not strict: what is missing or too much is not right, and counts as nothing.
    for step, text in zip(steps, response.split(","), strict=False):
        written = int(text) if _NUMBER.fullmatch(text) else None
        right += before is not None and written == before + step
        before = written
    return right, len(steps)


def judge(task: Grader, sample: Row, *, counts: Counter[str] | None = None) -> dict[str, str] | None:
    """Makes a preference of the responses to one prompt: a right one over a wrong one.

    Args:
        task: What can tell right from wrong.
        sample: A row ``{"prompt": str, "responses": [str, ...]}``.
        counts: Is told what became of the row: ``"pairs"``, ``"all right"``, ``"all wrong"``, or ``"all right or empty"``
            where the only wrong responses have no text: there is nothing in them to learn from, or to keep away from.

    Returns:
        The first right response as ``"chosen"`` and the first wrong one as ``"rejected"``, with their ``"prompt"``;
        None where the responses are all right, all wrong or, those that are wrong, empty.

    Raises:
        ValueError: If the row has another form, or the task does not know its prompt.
    """
    prompt, responses = _read_sample(sample)
    first: dict[bool, str] = {}
    for response in responses:
        try:
            right = task.grade(prompt, response)
        except ValueError as error:
            raise ValueError(f"{sample.origin}: {error}") from error
        if right or response.strip():
            first.setdefault(right, response)
    if counts is not None:
        any_empty = any(not response.strip() for response in responses)
        alone = "all wrong" if True not in first else "all right or empty" if any_empty else "all right"
        counts["pairs" if len(first) == 2 else alone] += 1
    return {"prompt": prompt, "chosen": first[True], "rejected": first[False]} if len(first) == 2 else None


def judge_file(task: RowTask, *, samples: str, preferences: str, winners: str | None = None) -> None:
    """Make preferences out of the samples that ``lightning-align predict`` wrote.

    For each prompt the first right response is preferred over the first wrong one. Prompts whose responses are all
    right or all wrong give nothing; how many there were is printed.

    Args:
        task: The task that the prompts come from; it must be able to grade a response.
        samples: JSONL file of rows {"prompt": str, "responses": [str, ...]}.
        preferences: JSONL file to write, of rows {"prompt", "chosen", "rejected"}.
        winners: JSONL file to write, of rows {"prompt", "response"}: the chosen responses of the same prompts alone, to
            train on with SFT and compare.

    Raises:
        ValueError: If the task cannot grade, two of the files are one, a row has another form, or no prompt gives a
            pair.
    """
    if not isinstance(task, Grader):
        raise ValueError(f"task={type(task).__name__}: expected a method grade(prompt, response); use Arithmetic")
    files = [path for path in (samples, preferences, winners) if path is not None]
    if len({Path(path).resolve() for path in files}) < len(files):
        raise ValueError(f"samples, preferences, winners={', '.join(files)}: expected different files; rename one")
    counts: Counter[str] = Counter()
    pairs = [pair for row in read_rows(samples) if (pair := judge(task, row, counts=counts)) is not None]
    tally = (
        f"{counts.total()} prompts: {counts['pairs']} pairs, {counts['all right']} with every response right,"
        f" {counts['all wrong']} with every response wrong, {counts['all right or empty']} with every response right or empty"
    )
    if not pairs:
        raise ValueError(
            f"samples={samples}: expected a prompt with a right and a wrong response, found {tally};"
            " sample more responses per prompt, or at a higher temperature"
        )
    _write_rows(preferences, pairs)
    if winners is not None:
        _write_rows(winners, map(_winner, pairs))
    print(f"{tally}. Wrote {' and '.join(files[1:])}.")


def _draw(generator: random.Random, *, num_operands: int) -> str:
    """Draws a problem, uniformly among those without a negative intermediate result."""
    while True:
        value = generator.randint(10, 99)
        prompt = str(value)
        for _ in range(num_operands - 1):
            sign, operand = generator.choice("+-"), generator.randint(10, 99)
            value += operand if sign == "+" else -operand
            if value < 0:
                # Start over: mending the one step would make some problems likelier than others.
                break
            prompt += f"{sign}{operand}"
        else:
            return f"{prompt}="


def _parse(prompt: str) -> tuple[int, list[int]]:
    """Splits a problem into its first number and the signed numbers that are added to it."""
    if not _PROMPT.fullmatch(prompt):
        raise ValueError(f"prompt={prompt!r}: expected a problem such as '27+82-42='; grade only prompts of this task")
    first, *steps = map(int, re.findall(r"[+-]?[0-9]+", prompt))
    return first, steps


def _work_out(prompt: str, slips: random.Random, *, forget_borrow: float) -> str:
    """Writes the running results of a problem, with forgotten borrows."""
    value, steps = _parse(prompt)
    results = []
    for step in steps:
        needs_borrow = step < 0 and value % 10 < -step % 10
        value += step
        # Drawn only where it matters; random() is below 1, so probabilities 0 and 1 mean never and always.
        if needs_borrow and slips.random() < forget_borrow:
            value += 10
        results.append(str(value))
    return ",".join(results)


def _read_sample(sample: Row) -> tuple[str, list[str]]:
    if sample.problem:
        raise ValueError(f"{sample.origin} {sample.problem}")
    prompt, responses = sample.fields.get("prompt"), sample.fields.get("responses")
    if (
        not isinstance(prompt, str)
        or not isinstance(responses, list)
        or not responses
        or not all(isinstance(response, str) for response in responses)
    ):
        raise ValueError(
            f"{sample.origin} has prompt={prompt!r}, responses={responses!r}: expected a string and a list of one or"
            " more strings; give the file that `lightning-align predict` writes"
        )
    return prompt, responses


def _winner(pair: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": pair["prompt"], "response": pair["chosen"]}


def _write_rows(path: str, rows: Iterable[Mapping[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    publish_text(path, text)
