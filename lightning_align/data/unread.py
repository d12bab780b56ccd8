"""Columns of a row that are not read, and the question of a row if it is in one of them."""

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from lightning_align.data.conversations import BadRowError

_QUESTION = re.compile(
    r"(^|[_\W\d])(prompts?|instructions?|questions?|query|queries|inputs?|problems?|request|task|user|human|ask|asked|post|posts"
    r"|history|conversations?|dialog|dialogue|context|article|document|source_text|src|q)($|[_\W\d])",
    re.IGNORECASE,
)
_ID = re.compile(
    r"(^|_)(id|ids|idx|index|hash|uuid|type|source|name|category|len|length|tokens?|score|url|lang|language)$", re.IGNORECASE
)
_RESPONSE = re.compile(
    r"(^|[_\W\d])(outputs?|answers?|completions?|targets?|solutions?|replies|reply|assistant|a)($|[_\W\d])", re.IGNORECASE
)


def unread_columns(fields: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """Return the names of the columns that have a value and were not read."""
    return [name for name, value in fields.items() if name not in read and value is not None]


def question_column(fields: Mapping[str, Any], *, besides: Collection[str]) -> str | None:
    """Find a column whose name and content are those of a question, other than given columns.

    The plainest name is returned: ``instruction`` before ``input``, because the second is often an addition to the first.
    """
    found = [name for name, value in fields.items() if name not in besides and _is_question(name, value)]
    order = ("instruction", "question", "query", "problem", "messages", "text")
    return min(found, key=lambda name: order.index(name) if name in order else len(order), default=None)


def check_question(fields: Mapping[str, Any], form: str, texts: Sequence[str], *, has_prompt: bool) -> None:
    """Check that a row without a question in the columns that are read has none in another column.

    Args:
        fields: The row.
        form: The form of the row.
        texts: The texts that are read. A question that is in all of them is not missing.
        has_prompt: Whether the row has a prompt, so that nothing is missing.

    Raises:
        BadRowError: If there is such a column.
    """
    if has_prompt:
        return
    others = ("messages", "text") if form != "pair" else ()
    name = question_column(fields, besides=("prompt", "response", "chosen", "rejected", "system", "tools", *others))
    if name is None:
        return
    value = fields[name]
    if isinstance(value, str) and texts and all(_squeezed(value) in _squeezed(text) for text in texts):
        return
    target = "messages" if form == "messages" else "prompt"
    mapping = f"`columns: {{prompt: {name}}}`"
    if target == "messages":
        mapping += " together with the column of the response"
    raise BadRowError(
        "question_not_read",
        f"has its question in field {name!r}, which is not read, and no question in the fields that are: expected it in"
        f" {target!r}. Set {mapping} to read it",
    )


def advise_columns(fields: Mapping[str, Any], missing: Sequence[str]) -> str:
    """Return advice for a row without some of the columns that a form needs, or an empty text."""
    mapping = {}
    known = ("prompt", "response", "chosen", "rejected", "messages", "text", "system", "tools")
    if "prompt" in missing and (name := question_column(fields, besides=known)):
        mapping["prompt"] = name
    if "response" in missing:
        names = [name for name, value in fields.items() if isinstance(value, str) and _RESPONSE.search(name)]
        names = [name for name in names if name not in known]
        if names and ("prompt" not in missing or "prompt" in mapping):
            mapping["response"] = names[0]
    for wanted in missing:
        others = [name for name, value in fields.items() if name not in known and isinstance(value, (str, list))]
        alike = next((name for name in others if _alike(name, wanted)), None)
        if alike and wanted not in mapping:
            mapping[wanted] = alike
    if not mapping:
        return ". Other names are read with `columns`, such as `columns: {prompt: question.text}`" if missing else ""
    return f". Set `columns: {{{', '.join(f'{name}: {column}' for name, column in mapping.items())}}}` to read other fields"


def _alike(name: str, wanted: str) -> bool:
    """Return whether a column is a misspelt one, or has the name of one in its own."""
    return wanted in name.lower() or SequenceMatcher(None, name.lower(), wanted).ratio() >= 0.8


def _is_question(name: str, value: Any) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    if name not in ("messages", "text") and (not _QUESTION.search(words) or _ID.search(words)):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(isinstance(item, str | Mapping) for item in value)


def _squeezed(text: str) -> str:
    return "".join(text.split())
