"""Sums and differences with demonstrations that may contain errors, a grader, and preferences made with the grader.

The right response to the prompt ``"27+82-42="`` is the intermediate results ``"109,67"``. A demonstration with errors
forgets the borrow of a subtraction. The result is then 10 too large, and the error is carried on: the response to
``"52-17-11="`` is ``"45,34"``. A model that imitates such demonstrations makes the same errors. Preferences between right
and wrong samples can correct it.
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
"""A version in the fingerprint. Increase it when the same arguments produce other rows."""
_PROMPT = re.compile(r"[1-9][0-9](?:[+-][1-9][0-9])+=")
# A number as Python prints it. The limit on its length prevents huge integers from degenerate responses.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_MAX_REPEATS = 50_000
"""After this many draws in a row without a new problem, there are (almost) no problems left."""


class Arithmetic(RowTask):
    """Sums and differences of two-digit numbers. The response lists the intermediate results.

    No intermediate result is negative, and no problem occurs twice. The three splits are disjoint for all seeds, because
    the text of a problem decides its split: 8 of 10 problems belong to ``train``, 1 to ``validation`` and 1 to ``test``.

    Args:
        num_rows: The number of rows.
        seed: The seed of the problems and of the forgotten borrows. The two are drawn independently.
        forget_borrow: The probability that a subtraction that needs a borrow forgets it. 0 gives demonstrations without
            errors. The prompts do not depend on it.
        num_operands: The number of operands of a problem, at least 2. A response has one number fewer.
        split: Which of the three disjoint sets of problems to draw from: ``train``, ``validation`` or ``test``.

    Raises:
        ValueError: If an argument is out of range.
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
            raise ValueError(f"`num_rows` must be at least 1, but got {num_rows}")
        if not 0 <= forget_borrow <= 1:
            raise ValueError(f"`forget_borrow` must be a probability from 0 to 1, but got {forget_borrow}")
        if num_operands < 2:
            raise ValueError(f"`num_operands` must be at least 2, but got {num_operands}")
        if split not in get_args(Split):
            raise ValueError(f"`split` must be one of {', '.join(get_args(Split))}, but got {split!r}")
        self.num_rows = num_rows
        self.seed = seed
        self.forget_borrow = forget_borrow
        self.num_operands = num_operands
        self.split: Split = split

    @property
    def fingerprint(self) -> str:
        """The arguments and the version of the task, as JSON."""
        return json.dumps({"rules": _RULES} | vars(self), sort_keys=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield rows ``{"prompt", "response"}``."""
        # Two generators, so that the problems do not depend on the errors.
        slips = random.Random(f"slips {self.seed}")
        for prompt in self._prompts(random.Random(f"problems {self.seed}")):
            yield {"prompt": prompt, "response": _work_out(prompt, slips, forget_borrow=self.forget_borrow)}

    def grade(self, prompt: str, response: str) -> bool:
        """Check whether a response is right: all steps are right, and it contains nothing else.

        Raises:
            ValueError: If the prompt is not a problem of this task.
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
        """Yield the preferences that `judge` makes from the samples.

        Args:
            samples: Rows ``{"prompt": str, "responses": [str, ...]}``.
            form: ``"preferences"`` yields rows ``{"prompt", "chosen", "rejected"}``. ``"winners"`` yields only the chosen
                responses, as rows ``{"prompt", "response"}``.
            counts: A counter to which the outcome of each row of samples is added. See `judge`.

        Raises:
            ValueError: If a row has another form or its prompt is not a problem of this task.
        """
        for number, fields in enumerate(samples, start=1):
            pair = judge(self, Row(dict(fields), f"samples, row {number}"), counts=counts)
            if pair is not None:
                yield pair if form == "preferences" else _winner(pair)

    def _prompts(self, generator: random.Random) -> Iterator[str]:
        """Yield the problems of the split, each once."""
        seen: set[str] = set()
        repeats = 0
        while len(seen) < self.num_rows:
            prompt = _draw(generator, num_operands=self.num_operands)
            if prompt in seen or split_of(prompt) != self.split:
                repeats += 1
                if repeats == _MAX_REPEATS:
                    raise ValueError(
                        f"`num_rows` must be at most about {len(seen)} with split={self.split!r} and"
                        f" num_operands={self.num_operands}, but got {self.num_rows}. Use fewer rows or more operands."
                    )
                continue
            repeats = 0
            seen.add(prompt)
            yield prompt


def split_of(prompt: str) -> Split:
    """Return the split of a problem. It depends on a hash of the text of the problem."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def steps_right(prompt: str, response: str) -> tuple[int, int]:
    """Count the right steps of a response.

    Each step is checked against the result that the response gives for the step before. An error therefore makes one step
    wrong, and not the steps that carry it on. A step is also wrong if it is missing, is not a plain number, or follows a
    step that is not a plain number.

    Args:
        prompt: A problem, such as ``"27+82-42="``.
        response: The response. For this problem, ``"109,67"`` is right.

    Returns:
        The number of right steps, and the number of steps of the problem.

    Raises:
        ValueError: If the prompt is not a problem of this task.
    """
    value, steps = _parse(prompt)
    before: int | None = value
    right = 0
    # Not strict: the response may have too few or too many steps. Extra steps are ignored here.
    for step, text in zip(steps, response.split(","), strict=False):
        written = int(text) if _NUMBER.fullmatch(text) else None
        right += before is not None and written == before + step
        before = written
    return right, len(steps)


def judge(task: Grader, sample: Row, *, counts: Counter[str] | None = None) -> dict[str, str] | None:
    """Make a preference pair from the responses to a prompt: a right response over a wrong response.

    Args:
        task: The task that grades the responses.
        sample: A row ``{"prompt": str, "responses": [str, ...]}``.
        counts: A counter to which the outcome of the row is added: ``"pairs"``, ``"all right"``, ``"all wrong"``, or
            ``"all right or empty"`` if some responses are right and all others are empty. An empty response is never
            ``"rejected"``, because it contains no text to train on.

    Returns:
        The ``"prompt"``, the first right response as ``"chosen"``, and the first wrong response as ``"rejected"``. None if
        there are no right responses, or no wrong responses that are not empty.

    Raises:
        ValueError: If the row has another form, or its prompt is not a problem of the task.
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
        no_pair = "all wrong" if True not in first else "all right or empty" if any_empty else "all right"
        counts["pairs" if len(first) == 2 else no_pair] += 1
    return {"prompt": prompt, "chosen": first[True], "rejected": first[False]} if len(first) == 2 else None


def judge_file(task: RowTask, *, samples: str, preferences: str, winners: str | None = None) -> None:
    """Make preference pairs from the samples that ``lightning-align predict`` wrote.

    For each prompt, the first right response is preferred over the first wrong response. Prompts with only right or only
    wrong responses give no pair. Their number is printed.

    Args:
        task: The task of the prompts. It must have a method that grades responses.
        samples: A JSONL file with rows {"prompt": str, "responses": [str, ...]}.
        preferences: The JSONL file to write, with rows {"prompt", "chosen", "rejected"}.
        winners: A second JSONL file to write, with rows {"prompt", "response"}. It has only the chosen responses of the
            same prompts, for a comparison with SFT.

    Raises:
        ValueError: If the task cannot grade, two files are the same, a row has another form, or no prompt gives a pair.
    """
    if not isinstance(task, Grader):
        raise ValueError(
            f"`task` must have a method grade(prompt, response), but got {type(task).__name__}. Use a task such as Arithmetic."
        )
    files = [path for path in (samples, preferences, winners) if path is not None]
    if len({Path(path).resolve() for path in files}) < len(files):
        raise ValueError(f"`samples`, `preferences` and `winners` must be different files, but got {', '.join(files)}")
    counts: Counter[str] = Counter()
    pairs = [pair for row in read_rows(samples) if (pair := judge(task, row, counts=counts)) is not None]
    tally = (
        f"{counts.total()} prompts: {counts['pairs']} pairs, {counts['all right']} with every response right,"
        f" {counts['all wrong']} with every response wrong, {counts['all right or empty']} with every response right or empty"
    )
    if not pairs:
        raise ValueError(
            f"`samples` must have a prompt with a right and a wrong response, but {samples} has {tally}."
            " Sample more responses per prompt, or use a higher temperature."
        )
    _write_rows(preferences, pairs)
    if winners is not None:
        _write_rows(winners, map(_winner, pairs))
    print(f"{tally}. Wrote {' and '.join(files[1:])}.")


def _draw(generator: random.Random, *, num_operands: int) -> str:
    """Draw a problem uniformly from those without negative intermediate results."""
    while True:
        value = generator.randint(10, 99)
        prompt = str(value)
        for _ in range(num_operands - 1):
            sign, operand = generator.choice("+-"), generator.randint(10, 99)
            value += operand if sign == "+" else -operand
            if value < 0:
                # Start over. Drawing only this step again would not be uniform.
                break
            prompt += f"{sign}{operand}"
        else:
            return f"{prompt}="


def _parse(prompt: str) -> tuple[int, list[int]]:
    """Split a problem into its first number and the signed numbers that are added to it."""
    if not _PROMPT.fullmatch(prompt):
        raise ValueError(f"`prompt` must be a problem such as '27+82-42=', but got {prompt!r}")
    first, *steps = map(int, re.findall(r"[+-]?[0-9]+", prompt))
    return first, steps


def _work_out(prompt: str, slips: random.Random, *, forget_borrow: float) -> str:
    """Write the intermediate results of a problem, with forgotten borrows."""
    value, steps = _parse(prompt)
    results = []
    for step in steps:
        needs_borrow = step < 0 and value % 10 < -step % 10
        value += step
        # Drawn only if a borrow is needed. random() is below 1, so probabilities 0 and 1 mean never and always.
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
            f"{sample.origin} has prompt={prompt!r} and responses={responses!r}, expected a string and a list of one or"
            " more strings. Use the file that `lightning-align predict` wrote."
        )
    return prompt, responses


def _winner(pair: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": pair["prompt"], "response": pair["chosen"]}


def _write_rows(path: str, rows: Iterable[Mapping[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    publish_text(path, text)
