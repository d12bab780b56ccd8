"""From the columns of a source to the fields of the forms: names of columns, roles of messages, and shapes of rows."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import blake2b
from typing import Any, get_args

from lightning_align.data.conversations import BadRowError
from lightning_align.data.files import Row
from lightning_align.data.forms import Form
from lightning_align.data.ledger import UNPAIRED, Ledger
from lightning_align.data.shapes import Fields, RankedPairs, Shape, convert, find_shape

_DIALOGS = ("messages", "prompt", "response", "chosen", "rejected")
_PROMPTS = ("prompt", "messages", "instruction", "input", "question", "conversations", "system", "history")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_FIELDS = (
    *(*_DIALOGS, *_PROMPTS, "text", "tools", "weight", "margin", "chat_template_kwargs", "conversation", "context", "output"),
    *("completion", "completions", "answer", "answers", "responses", "rank", "ranks", "score", "scores", "label", "choice"),
    *("answer_0", "answer_1", "answer_2", "answer_a", "answer_b", "response_0", "response_1", "response_2", "labels"),
    *("response1", "response2", "output_1", "output_2", "conversation_a", "conversation_b", "summaries", "info"),
    *("system_prompt", "winner"),
    *("preference", "preference_strength", "overall_preference", "better_response_id"),
    *("human_ref_A", "human_ref_B", "overall_score", "rating", "reward"),
)
"""The fields that forms and shapes read."""
_KNOWN_ROLES = ("user", "assistant", "system", "tool", "developer", "function")


@dataclass(frozen=True, kw_only=True)
class RowMapping:
    """How the rows of a source become rows of the forms.

    Args:
        columns: The column of each field, such as ``{"prompt": "instruction", "response": "output"}``. A column within a
            struct is named with a dot: ``info.post``. Of a list of structs it is the list of the values.
        roles: The role of each name in messages, such as ``{"human": "user"}``.
        shape: The shape of the rows, see `lightning_align.data.shapes`. ``auto`` finds it where it is certain, and ``plain``
            takes the rows as they are.
        ranked_pairs: The pairs of a ranked row: the best and the worst answer, all pairs of different rank, or each answer
            with the next one.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    shape: Shape = "auto"
    ranked_pairs: RankedPairs = "best_worst"

    def __post_init__(self) -> None:
        for name, choice, choices in (
            ("shape", self.shape, get_args(Shape)),
            ("ranked_pairs", self.ranked_pairs, get_args(RankedPairs)),
        ):
            if choice not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {choice!r}.")
        for what, given, known in (("columns", self.columns, _FIELDS), ("roles", self.roles.values(), _KNOWN_ROLES)):
            for name in given:
                if name not in known and (close := get_close_matches(str(name), known, n=1, cutoff=0.8)):
                    raise ValueError(
                        f"`{what}` must map to names that are known, but got {name!r}. Set it to {close[0]!r}, or to a"
                        " name that is less similar to it if it is meant."
                    )


def map_rows(
    rows: Iterable[Row],
    mapping: RowMapping,
    *,
    accepted: Sequence[Form],
    prompts_only: bool = False,
    ledger: Ledger | None = None,
    on_labelled: Callable[[], None] | None = None,
) -> Iterator[Row]:
    """Convert rows to rows of the forms, in order.

    The pairs of one row have the origin of that row. Two labelled rows of one prompt become a pair at the place of the
    second. Labelled rows without a partner yet are held in memory: all of a source in which all good answers come before all
    bad ones, and none of a source in which the answers of a prompt follow each other. Other rows are not.

    Args:
        rows: The rows, as they were read.
        mapping: How to convert them.
        accepted: The forms that are accepted.
        prompts_only: Whether only prompts are used, so that columns of responses may be missing.
        ledger: The ledger that counts the rows that are dropped, and the rows of each shape.
        on_labelled: Is called for each labelled row, before it waits for its partner.

    Raises:
        ValueError: If a row is bad and the ledger has ``on_bad_row="fail"``.
    """
    partners = _Partners()
    for row in rows:
        if row.problem:
            yield row
            continue
        try:
            fields = _rename(row.fields, mapping.columns, prompts_only=prompts_only) if mapping.columns else row.fields
            shape = find_shape(fields, accepted=accepted) if mapping.shape == "auto" else mapping.shape
            converted = [fields] if shape == "plain" else convert(fields, shape, ranked_pairs=mapping.ranked_pairs)
            converted = [_with_roles(fields, mapping.roles) for fields in converted]
        except BadRowError as error:
            if ledger is not None:
                ledger.drop(error.reason, origin=row.origin, problem=error.problem)
            continue
        if ledger is not None and shape != "plain":
            ledger.note(f"shape_{shape}")
        if shape == "labelled" and on_labelled is not None:
            on_labelled()
        for fields in converted:
            new = row if fields is row.fields else Row(fields, row.origin, row.problem)
            if shape != "labelled":
                yield new
            elif (pair := partners.match(new)) is not None:
                yield pair
    for row in partners.rest():
        if ledger is not None:
            ledger.drop(UNPAIRED, origin=row.origin, problem="has no answer of another label for its prompt")


class _Partners:
    """Labelled rows that wait for a row of another label. Only these are held in memory."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, deque[Row]] = {}

    def match(self, row: Row) -> Row | None:
        """Pair a row with the first one of its prompt that has another label, or let it wait."""
        text = json.dumps(row.fields["prompt"], sort_keys=True, default=str)
        waiting = self._waiting.setdefault(blake2b(text.encode(), digest_size=16).digest(), deque())
        if not waiting or waiting[0].fields["label"] == row.fields["label"]:
            waiting.append(row)
            return None
        other = waiting.popleft()
        if not waiting:
            del self._waiting[blake2b(text.encode(), digest_size=16).digest()]
        good, bad = (row, other) if row.fields["label"] > other.fields["label"] else (other, row)
        fields = {name: value for name, value in good.fields.items() if name not in ("response", "label")}
        pair = {**fields, "chosen": good.fields["response"], "rejected": bad.fields["response"]}
        return Row(pair, f"{good.origin} with {bad.origin}")

    def rest(self) -> Iterator[Row]:
        """Yield the rows without a partner."""
        for waiting in self._waiting.values():
            yield from waiting


def _rename(fields: Fields, columns: Mapping[str, str], *, prompts_only: bool) -> Fields:
    found: Fields = {}
    for target, source in columns.items():
        try:
            found[target] = _look_up(fields, source, source)
        except BadRowError:
            if not prompts_only or target in _PROMPTS:
                raise
    taken = set(columns.values())
    return {**{name: value for name, value in fields.items() if name not in taken}, **found}


def _look_up(value: Any, path: str, whole: str) -> Any:
    if isinstance(value, list):
        return [_look_up(element, path, whole) for element in value]
    if isinstance(value, Mapping):
        if path in value:
            return value[path]
        first, dot, rest = path.partition(".")
        if dot and first in value:
            return None if value[first] is None else _look_up(value[first], rest, whole)
        names = ", ".join(value)
        where = "" if path == whole else f" in {whole.removesuffix(path)[:-1]!r}"
        raise BadRowError("unknown_column", f"has no column {path!r}{where}, which `columns` names. The columns are: {names}")
    raise BadRowError("unknown_column", f"has no column {whole!r}, which `columns` names: {value!r:.40} has no columns")


def _with_roles(fields: Fields, roles: Mapping[str, str]) -> Fields:
    """Return a row with messages of ``role`` and ``content``, whatever names its messages have."""
    changed = {}
    for name in _DIALOGS:
        value = fields.get(name)
        if isinstance(value, dict) and ("from" in value or "role" in value):
            value = changed[name] = [value]
        if isinstance(value, list) and any(isinstance(message, dict) and _is_foreign(message, roles) for message in value):
            changed[name] = [_message(message, roles) if isinstance(message, dict) else message for message in value]
    return {**fields, **changed} if changed else fields


def _is_foreign(message: Fields, roles: Mapping[str, str]) -> bool:
    role = message.get("role")
    return role is None or role in roles or role in _ROLES or _other_content(message) is not None


def _other_content(message: Fields) -> str | None:
    """Return the content of a message that has it under another name."""
    if message.get("content") is not None:
        return None
    return next((name for name in ("value", "text") if isinstance(message.get(name), str)), None)


def _message(message: Fields, roles: Mapping[str, str]) -> Fields:
    name = message.get("role")
    if name is not None:
        if (other := _other_content(message)) is not None:
            message = {key: value for key, value in message.items() if key != other} | {"content": message[other]}
        return {**message, "role": roles.get(name, _ROLES.get(name, name))}
    if "value" not in message or not isinstance(name := message.get("from"), str):
        return message
    role = roles.get(name, _ROLES.get(name, name))
    if role not in _KNOWN_ROLES and name not in roles:
        raise BadRowError("unknown_role", f"has a message from {name!r}. Give its role with `roles`, such as {name}: user")
    # Arrow gives every struct all keys of the column, with None for those that it did not have.
    rest = {
        key: value for key, value in message.items() if key not in ("from", "value", "role", "content") and value is not None
    }
    return {"role": role, "content": message["value"], **rest}
