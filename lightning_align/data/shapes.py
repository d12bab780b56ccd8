"""The shapes of public data sets, and their conversion to the forms of `lightning_align.data.forms`.

============  ========================================================================  ================================
shape         columns                                                                   becomes
============  ========================================================================  ================================
``sharegpt``  ``conversations`` of ``{from, value}``, of ``{input, output}`` or of      ``messages``; a pair if there are
              texts that alternate; ``system``                                          ``chosen`` and ``rejected``
``alpaca``    ``instruction``, ``input`` or ``context``, ``output``; ``system``,        ``prompt``, ``response``
              ``history``
``completion`` ``prompt``, ``completion``; ``system``                                   ``prompt``, ``response``
``pair``      ``question`` or ``instruction``, ``chosen``, ``rejected``; ``system``     a pair
``ranked``    a prompt, ``answers`` with ``rank`` or ``score``                          pairs
``labelled``  a prompt, ``completion``, ``label`` (good or bad, or a number)            pairs of rows with one prompt
``choice``    a prompt, two answers, and which is better                                a pair
============  ========================================================================  ================================

The input of an instruction follows it on a new line. A row with a text in the column ``system``, even an empty one, or with a
``history`` becomes messages. Columns that a shape does not read are left in the row. A column with the value None counts as
missing.
"""

import math
from collections.abc import Callable, Iterable
from itertools import combinations, pairwise
from typing import Any, Literal

from lightning_align.data.conversations import BadRowError
from lightning_align.data.forms import Form
from lightning_align.data.ledger import TIED

Shape = Literal["auto", "plain", "sharegpt", "alpaca", "completion", "pair", "ranked", "labelled", "choice"]
RankedPairs = Literal["best_worst", "all", "adjacent"]
Fields = dict[str, Any]

_QUESTIONS = ("prompt", "instruction", "question", "history", "context", "input")
_SYSTEMS = ("system", "system_prompt")
_ANSWERS = ("answers", "responses", "completions")
_ANSWER = ("completion", "response", "answer", "output")
_TEXTS = ("answer", "text", "response", "content", "completion")
_DIALOGS = ("conversations", "conversation")
_TREE = {"text", "role", "parent_id"}
_RANKS, _SCORES = ("ranks", "rank"), ("scores", "score", "overall_score", "rating", "reward")


def find_shape(fields: Fields, *, accepted: Iterable[Form]) -> Shape:
    """Find the shape of a row from its columns, if it is certain.

    Args:
        fields: The row. A column with the value None counts as missing.
        accepted: The forms that are accepted. Shapes of pairs are found only where pairs are.

    Returns:
        The shape, or ``plain`` if the row has one of the forms already or its shape is not certain.
    """
    names = {name for name, value in fields.items() if value is not None}
    pairs, is_dialog = "pair" in accepted, any(_is_dialog(fields.get(name)) for name in _DIALOGS)
    if not pairs and "prompt" not in accepted:
        _refuse_bad_answers(fields)
    if {"chosen", "rejected"} <= names:
        if "prompt" in names:
            return "pair" if _has_system(fields, "prompt", "chosen", "rejected") else "plain"
        if is_dialog:
            return "sharegpt"
        return "pair" if names & {"question", "instruction"} or {"system", "input"} <= names else "plain"
    is_labelled = pairs and _is_label(fields.get("label"))
    if {"prompt", "response"} <= names and not is_labelled:
        return "completion" if _has_system(fields, "prompt", "response") else "plain"
    if "messages" in names:
        return "plain"
    if is_dialog:
        return "sharegpt"
    if names >= _TREE and "text" in accepted:
        raise BadRowError(
            "part_of_a_tree",
            "is one message of a tree of messages (it has 'role' and 'parent_id'), and would be trained without its "
            "conversation. Join the messages of each path to a list 'messages', or set `shape: plain` to train on 'text' alone",
        )
    if pairs and _layout(fields) is not None:
        return "choice"
    if pairs and names & {"prompt", "instruction", "question"} and _grades(fields) is not None:
        return "ranked"
    if "instruction" in names and (names & {"output", "response"} or ("prompt" in accepted and "prompt" not in names)):
        return "alpaca"
    if "prompt" in names and names & {"completion", "response"}:
        return "labelled" if is_labelled else "completion" if "label" not in names or _is_label(fields["label"]) else "plain"
    if {"system_prompt", "question", "response"} <= names:
        return "completion"
    return "alpaca" if "prompt" in accepted and _has_system(fields, "prompt") else "plain"


def _refuse_bad_answers(fields: Fields) -> None:
    """Raise for an answer that is labelled as bad, where it would be learned as a good one."""
    # A 0 may be a class, except in the layout of TRL.
    bad = ("false",) if fields.get("completion") is None else ("false", "0", "0.0")
    for name in ("label", "kto_tag"):
        if str(fields.get(name)).strip().lower() in bad:
            raise BadRowError(
                "bad_answer",
                f"is labelled as a bad answer (column {name!r}), but would be learned as a good one. Leave such rows out, or "
                "set `shape: plain` to ignore the label",
            )


def _has_system(fields: Fields, *texts: str) -> bool:
    """Check whether a row of strings has a system message beside it, even an empty one."""
    return isinstance(fields.get("system"), str) and all(isinstance(fields.get(name), str) for name in texts)


def _is_label(value: Any) -> bool:
    """Check whether a value says good or bad, and not how good."""
    return _as_label(value) in (0.0, 1.0)


def convert(fields: Fields, shape: Shape, *, ranked_pairs: RankedPairs) -> list[Fields]:
    """Convert a row of a shape to rows of the forms: several pairs of a ranked row, otherwise one row.

    Rows of ``labelled`` have ``prompt``, ``response`` and a number ``label``, and have to be paired.

    Raises:
        BadRowError: If the row does not have the shape.
    """
    if shape == "ranked":
        return _ranked(fields, ranked_pairs)
    return [_CONVERTERS[shape](dict(fields))]


# -- shapes of one response


def _sharegpt(fields: Fields) -> Fields:
    turns = _take(fields, _DIALOGS, shape="sharegpt")
    if not isinstance(turns, list):
        raise BadRowError("wrong_type", "has a column 'conversations' that is not a list of messages")
    messages, system = _messages(turns), _pop(fields, _SYSTEMS)
    if system and not (messages and isinstance(messages[0], dict) and _role(messages[0]) == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    if fields.get("chosen") is not None and fields.get("rejected") is not None:
        return {**fields, "prompt": messages}
    return {**fields, "messages": messages}


def _messages(turns: list[Any]) -> list[Any]:
    """Return turns as messages: of texts that alternate, or of objects with the text of the user and the answer to it."""
    if all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    if not all(_is_exchange(turn) for turn in turns):
        return turns
    messages = []
    for turn in turns:
        texts = {"system": turn.get("system"), "user": turn["input"], "assistant": turn["output"]}
        messages += [{"role": role, "content": text} for role, text in texts.items() if text]
    return messages


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, dict) and _role(turn) is None and isinstance(turn.get("input"), str) and "output" in turn


def _alpaca(fields: Fields) -> Fields:
    output = fields.pop("output", None)
    response = fields.pop("response", None) if output is None else output
    prompt = _take_prompt(fields, shape="alpaca")
    return {**fields, "prompt": prompt, "response": response}


def _completion(fields: Fields) -> Fields:
    response = _take(fields, _ANSWER, shape="completion")
    prompt = _take_prompt(fields, shape="completion")
    return {**fields, "prompt": prompt, "response": response}


def _labelled(fields: Fields) -> Fields:
    label = _as_label(value := _take(fields, ("label",), shape="labelled"))
    if label is None:
        raise BadRowError(
            "wrong_type", f"has {value!r} in column 'label', expected true (good) or false (bad), or a number (more is better)"
        )
    return {**_completion(fields), "label": label}


# -- shapes of pairs


def _pair(fields: Fields) -> Fields:
    prompt = _take_prompt(fields, shape="pair")
    return {**fields, "prompt": prompt}


def _ranked(fields: Fields, ranked_pairs: RankedPairs) -> list[Fields]:
    grades = _grades(fields)
    if grades is None:
        raise _lacks(fields, "ranked", "a list 'answers' whose elements have a text and a 'rank' or 'score'")
    rest = {name: value for name, value in fields.items() if name not in (*_ANSWERS, *_RANKS, *_SCORES)}
    rest["prompt"] = _take_prompt(rest, shape="ranked")
    best_first = sorted(grades, key=lambda graded: -graded[0])
    if ranked_pairs == "best_worst":
        pairs = [(best_first[0], best_first[-1])] if best_first else []
    else:
        pairs = list(combinations(best_first, 2) if ranked_pairs == "all" else pairwise(best_first))
    rows = [{**rest, "chosen": a[1], "rejected": b[1]} for a, b in pairs if a[0] > b[0]]
    if not rows:
        raise BadRowError(TIED, f"has {len(grades)} answers, none of them better than another")
    return rows


def _choice(fields: Fields) -> Fields:
    layout = _layout(fields)
    if layout is None:
        raise _lacks(
            fields,
            "choice",
            "'answer_0', 'answer_1' and 'choice' (0 or 1), or 'answer_1', 'answer_2' and 'choice' (1 or 2), or 'answer_a',"
            " 'answer_b' and 'choice' (a or b), or a list of two 'answers' and its index in 'choice'",
        )
    names, label, better = layout
    value = fields.pop(label)
    if len(names) == 1:
        answers = [_text(answer) for answer in fields.pop(names[0])]
    else:
        answers = [fields.pop(name) for name in names]
    try:
        best = better(value)
    except (ValueError, TypeError, KeyError) as error:
        raise BadRowError("wrong_type", f"has {value!r} in column {label!r}, which names neither answer") from error
    if best is None:
        raise BadRowError(TIED, f"has {value!r} in column {label!r}: neither answer is better")
    info = fields.get("info")
    if isinstance(info, dict) and fields.get("prompt") is None:
        fields["prompt"] = info.get("post") or info.get("article")
        fields.pop("info")
    if names[0] != "conversation_a":  # its answers are whole conversations, with the prompt
        fields["prompt"] = _take_prompt(fields, shape="choice")
    return {**fields, "chosen": answers[best], "rejected": answers[1 - best]}


def _named(first: float, second: float) -> Callable[[Any], int | None]:
    """Return a function that finds the better answer from the number that names it."""
    return lambda value: {first: 0, second: 1}[float(value)]


def _letter(value: Any) -> int | None:
    text = str(value).lower().removeprefix("model_").strip()
    return None if text.startswith(("tie", "both")) else {"a": 0, "b": 1}[text]


def _sign(value: Any) -> int | None:
    number = float(value)
    if math.isnan(number):
        raise ValueError("not a number")
    return None if number == 0 else int(number > 0)


_LAYOUTS: tuple[tuple[tuple[str, ...], str, Callable[[Any], int | None]], ...] = (
    (("answer_0", "answer_1"), "choice", _named(0, 1)),
    (("answer_1", "answer_2"), "choice", _named(1, 2)),
    (("answer_a", "answer_b"), "choice", _letter),
    (("summaries",), "choice", _named(0, 1)),  # summarize-from-feedback
    (("answers",), "choice", _named(0, 1)),
    (("human_ref_A", "human_ref_B"), "labels", _named(1, 0)),  # SHP: 1 if A is preferred
    (("response_1", "response_2"), "preference_strength", _sign),  # HelpSteer 2: below 0 if the first is better
    (("response1", "response2"), "overall_preference", _sign),  # HelpSteer 3
    (("response_0", "response_1"), "better_response_id", _named(0, 1)),  # PKU-SafeRLHF
    (("output_1", "output_2"), "preference", _named(1, 2)),  # AlpacaFarm
    (("conversation_a", "conversation_b"), "winner", _letter),  # Chatbot Arena
)


def _layout(fields: Fields) -> tuple[tuple[str, ...], str, Callable[[Any], int | None]] | None:
    for layout in _LAYOUTS:
        names, label, _ = layout
        if all(fields.get(name) is not None for name in (*names, label)):
            answers = fields[names[0]]
            if len(names) == 2 or (isinstance(answers, list) and len(answers) == 2):
                return layout
    return None


# -- parts


def _grades(fields: Fields) -> list[tuple[float, Any]] | None:
    """Read the answers of a ranked row with their grades, of which a higher one is better. None if there are none."""
    answers = next((fields[name] for name in _ANSWERS if isinstance(fields.get(name), list)), None)
    if not answers:
        return None
    for names, sign in ((_RANKS, -1), (_SCORES, 1)):
        for name in names:
            grades = fields.get(name)
            if grades is None and all(isinstance(answer, dict) and answer.get(name) is not None for answer in answers):
                grades = [answer[name] for answer in answers]
            if isinstance(grades, list) and len(grades) == len(answers):
                try:
                    numbers = [sign * float(grade) for grade in grades]
                except (TypeError, ValueError):
                    continue
                if not any(map(math.isnan, numbers)):
                    return [(number, _text(answer)) for number, answer in zip(numbers, answers, strict=True)]
    return None


def _text(answer: Any) -> Any:
    if isinstance(answer, dict):
        return next((answer[name] for name in _TEXTS if answer.get(name) is not None), None)
    return answer


def _take_prompt(fields: Fields, *, shape: Shape) -> Any:
    """Remove the prompt of a row, with its input, system message and history, and return it."""
    # An empty text counts, so that all rows of a source are rendered alike. None does not: tables add it to every row.
    is_chat = any(fields.get(name) is not None for name in _SYSTEMS)
    extras: list[Any] = []
    history = None
    if fields.get("instruction") is not None:
        is_chat = is_chat or fields.get("history") is not None
        extras, history = [fields.pop("input", None), fields.pop("context", None)], fields.pop("history", None)
    prompt = _take(fields, _QUESTIONS, shape=shape)
    if any(extras):
        prompt = "\n".join(str(text) for text in (prompt, *extras) if text)
    system = _pop(fields, _SYSTEMS)
    if not is_chat:
        return prompt
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in history or ():
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages + (prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])


def _take(fields: Fields, names: Iterable[str], *, shape: Shape) -> Any:
    for name in names:
        if fields.get(name) is not None:
            return fields.pop(name)
    raise _lacks(fields, shape, " or ".join(map(repr, names)))


def _lacks(fields: Fields, shape: Shape, wanted: str) -> BadRowError:
    present = ", ".join(repr(name) for name, value in fields.items() if value is not None) or "none"
    return BadRowError("missing_field", f"has no column {wanted}, which the shape {shape!r} needs (it has {present})")


def _pop(fields: Fields, names: Iterable[str]) -> Any:
    found = [fields.pop(name, None) for name in names]
    return next((value for value in found if value), None)


def _role(message: Fields) -> Any:
    return message.get("role", message.get("from"))


def _is_dialog(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    is_chat = all(isinstance(m, dict) and isinstance(_role(m), str) for m in value)
    return is_chat or all(isinstance(m, str) for m in value) or all(_is_exchange(m) for m in value)


def _as_label(value: Any) -> float | None:
    """Read a label as a number, of which a higher one is better. None if it is none."""
    text = str(value).strip().lower()
    try:
        number = float({"true": "1", "false": "0"}.get(text, text))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_CONVERTERS: dict[Shape, Callable[[Fields], Fields]] = {
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
    "pair": _pair,
    "labelled": _labelled,
    "choice": _choice,
}
