"""The forms that a row may have, and their conversion to turns of a conversation.

========================================  ==========================================================================
form                                      fields
========================================  ==========================================================================
``response``                              ``prompt``, ``response``
``pair``                                  ``prompt``, ``chosen``, ``rejected``; or the last two with a common beginning
``messages``                              ``messages``
``text``                                  ``text``
``prompt``                                ``prompt``; other fields, such as ``response``, are ignored
========================================  ==========================================================================

The fields ``prompt``, ``response``, ``chosen`` and ``rejected`` are strings or lists of messages. Strings are used as they
are. Lists of messages are rendered with the chat template of the tokenizer. Beside them, three fields are read: ``tools`` (a
list of tools or its JSON), ``system`` (the system message, if the conversation has none) and ``chat_template_kwargs``
(variables of the template). A message with ``weight: 0``, ``train: false`` or ``training: false`` is not a target.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from lightning_align.data.conversations import BadRowError, ChatReader, Conversation, MaskTurns, Turn, restore, without_markers
from lightning_align.data.messages import is_blank, normalize_messages, read_template_kwargs, read_tools, shown
from lightning_align.data.prefixes import common_turns
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import Message, Tokenizer
from lightning_align.data.unread import advise_columns, check_question

Form = Literal["response", "pair", "messages", "text", "prompt"]

FIELDS: dict[Form, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "response": ("prompt", "response"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
DESCRIPTIONS: dict[Form, str] = {
    "pair": "{prompt, chosen, rejected}",
    "response": "{prompt, response}",
    "messages": "{messages}",
    "text": "{text}",
    "prompt": "{prompt}",
}


def form_of(fields: dict[str, Any], *, accepted: Sequence[Form]) -> Form:
    """Find the form of a row.

    Args:
        fields: The row. A field with the value None counts as missing.
        accepted: The forms that the row may have. The first form that has all its fields in the row is returned.

    Raises:
        BadRowError: If the row has none of the forms.
    """
    present = {name for name, value in fields.items() if value is not None}
    for form in accepted:
        if present.issuperset(FIELDS[form]):
            return form
    wanted = [name for form in accepted for name in FIELDS[form] if name not in present]
    missing = min(([name for name in FIELDS[form] if name not in present] for form in accepted), key=len)
    raise BadRowError(
        "missing_field",
        f"has no field {' and no field '.join(map(repr, missing))} (it has "
        f"{', '.join(map(repr, sorted(present))) or 'none'}):"
        f" expected {' or '.join(DESCRIPTIONS[form] for form in accepted)}{advise_columns(fields, wanted)}",
    )


def read_conversation(
    fields: dict[str, Any],
    *,
    form: Form,
    tokenizer: Tokenizer,
    mask_turns: MaskTurns,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Conversation:
    """Convert a row of any form except ``text`` to turns.

    Args:
        fields: The row.
        form: The form of the row, as returned by `form_of`.
        tokenizer: The tokenizer that renders messages with its chat template.
        mask_turns: Which turns are targets. See `lightning_align.data.encode.encode_rows`.
        chat_template_kwargs: Variables of the chat template. Those of the row have priority.

    Raises:
        BadRowError: If a field has the wrong type or is empty, the question of the row is in a field that is not read, or
            the template rejects the messages.
    """
    names = {"pair": ("chosen", "rejected"), "response": ("response",), "prompt": (), "messages": ()}[form]
    prompt, answers = _parts(fields, form, names)
    if isinstance(prompt, str):
        check_question(fields, form, [prompt, *answers], has_prompt=not is_blank(prompt))
        return _read_strings(prompt, answers, names, tokenizer)._replace(
            columns=_columns(fields, form), notes=_unused_tools(fields)
        )
    return _read_chat(fields, form, prompt, answers, tokenizer, mask_turns, chat_template_kwargs)


def read_prompt(
    fields: dict[str, Any], *, form: Form, tokenizer: Tokenizer, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Conversation:
    """Convert the prompt of a row to turns.

    The prompt of a row of messages is all messages, without the last one if it is from the assistant.

    Raises:
        BadRowError: See `read_conversation`.
    """
    if form == "messages":
        messages = _messages(fields, "messages")
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        fields = {**fields, "messages": None, "prompt": messages}
    elif form == "pair" and fields.get("prompt") is None:
        prompt, _ = _parts(fields, form, ("chosen", "rejected"))
        fields = {**fields, "prompt": prompt}
    conversation = read_conversation(
        fields, form="prompt", tokenizer=tokenizer, mask_turns="last_turn", chat_template_kwargs=chat_template_kwargs
    )
    return conversation._replace(columns=conversation.columns | set(FIELDS[form]))


def prompt_text(conversation: Conversation) -> str:
    """Return the prompt as text."""
    text = "".join(turn.context + turn.response for turn in conversation.history) + conversation.context
    return restore(text, conversation.stand_ins)


def side_text(conversation: Conversation, side: int = 0) -> str:
    """Return a response as text, without the prompt."""
    first, *others = conversation.sides[side]
    text = first.response + "".join(turn.context + turn.response for turn in others)
    return restore(text, conversation.stand_ins)


def _parts(fields: dict[str, Any], form: Form, names: Sequence[str]) -> tuple[str | list[Message], list[Any]]:
    """Return the prompt and the responses of a row, as strings or as messages. All messages of a conversation are a prompt."""
    if form == "messages":
        return _messages(fields, "messages"), []
    answers = [_text_or_messages(fields, name) for name in names]
    prompt = None if fields.get("prompt") is None else _text_or_messages(fields, "prompt")
    if isinstance(prompt, str) and answers and all(isinstance(answer, list) for answer in answers):
        prompt, answers = _with_string_prompt(prompt, answers, names)
    elif isinstance(prompt, list) and prompt and answers:
        answers = [_without_repeated(prompt, answer) for answer in answers]
        _check_systems(answers)
    if prompt is None:
        prompt, answers = _split_common(fields, answers, names)
    return prompt, answers


def _with_string_prompt(prompt: str, answers: list[Any], names: Sequence[str]) -> tuple[list[Message] | None, list[Any]]:
    """Read a row whose prompt is a string and whose responses are messages.

    The responses are what follows the prompt, or conversations that repeat it in a message of the user. System messages
    before the response come before the prompt.
    """
    systems = [_leading(answer, ("system", "developer")) for answer in answers]
    rests = [answer[len(system) :] for answer, system in zip(answers, systems, strict=True)]
    if all(rest and rest[0]["role"] == "assistant" for rest in rests):
        _check_systems(answers)
        return [*systems[0], {"role": "user", "content": prompt}], rests
    asked = [[m["content"].strip() for m in answer if m["role"] == "user"] for answer in answers]
    if not all(prompt.strip() in contents for contents in asked):
        raise BadRowError(
            "wrong_type",
            f"has a string as prompt and messages in {' and '.join(names)} that begin with another one, expected both as"
            " strings, both as messages, or messages that repeat the prompt",
        )
    if len(answers) == 2:
        return None, answers  # the conversations have the prompt in common
    index = next(i for i, m in enumerate(answers[0]) if m["role"] == "user" and m["content"].strip() == prompt.strip())
    return answers[0][: index + 1], [answers[0][index + 1 :]]


def _check_systems(answers: Sequence[Any]) -> None:
    """Check that both responses of a pair begin with the same system messages.

    Raises:
        BadRowError: If they differ, so that the responses are not to one prompt.
    """
    chats = [answer for answer in answers if isinstance(answer, list)]
    systems = [[message["content"] for message in _leading(answer, ("system", "developer"))] for answer in chats]
    if len(chats) == 2 and systems[0] != systems[1]:
        only = "" if all(systems) else f" (only {'chosen' if systems[0] else 'rejected'} has one)"
        raise BadRowError(
            "wrong_type",
            f"has different system messages in its chosen and rejected responses{only}, so they do not respond to one prompt:"
            " expected the same in both, or one in 'prompt' or in a field 'system'",
        )


def _leading(messages: list[Message], roles: Sequence[str]) -> list[Message]:
    num_leading = next((i for i, message in enumerate(messages) if message["role"] not in roles), len(messages))
    return messages[:num_leading]


def _without_repeated(prompt: list[Message], answer: Any) -> Any:
    """Remove the messages of the prompt from the beginning of a response that repeats them."""
    num = len(prompt)
    repeats = isinstance(answer, list) and [*map(shown, answer[:num])] == [*map(shown, prompt)]
    return answer[num:] if repeats and prompt[0]["role"] != "assistant" else answer


def _read_strings(prompt: str, answers: list[Any], names: Sequence[str], tokenizer: Tokenizer) -> Conversation:
    for name, answer in zip(names, answers, strict=True):
        if not isinstance(answer, str):
            raise BadRowError(
                "wrong_type",
                f"has a string as prompt and messages in field {name!r}, expected both as strings or both as messages",
            )
        if is_blank(without_markers(answer, tokenizer)):
            raise BadRowError("empty_response", f"has an empty text in field {name!r}, expected text to train on")
    sides = [[Turn(prompt, answer, True, True)] for answer in answers]
    return Conversation([], prompt, sides, templated=False)


def _read_chat(
    fields: dict[str, Any],
    form: Form,
    prompt: list[Message],
    answers: list[Any],
    tokenizer: Tokenizer,
    mask_turns: MaskTurns,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> Conversation:
    columns = set(_columns(fields, form))
    silent = ("assistant", "system", "developer")
    asked = any(message["role"] not in silent and not is_blank(message["content"]) for message in prompt)
    check_question(fields, form, [message["content"] for message in prompt], has_prompt=asked)
    system = fields.get("system")
    if isinstance(system, str) and not is_blank(system):
        given = [message["content"] for message in prompt if message["role"] in ("system", "developer")]
        if not given:
            prompt = [{"role": "system", "content": system}, *prompt]
        if not given or system.strip() in [content.strip() for content in given]:
            columns.add("system")
    options = _option(fields, "chat_template_kwargs", read_template_kwargs) or {}
    tools = _option(fields, "tools", read_tools)
    columns |= {"tools"} | ({"chat_template_kwargs"} if tokenizer.has_template else set())
    reader = ChatReader(
        tokenizer, mask_turns=mask_turns, tools=tools, template_kwargs={**(chat_template_kwargs or {}), **options}
    )
    if form == "messages":
        conversation = reader.messages(prompt)
    elif not answers:
        conversation = reader.prompt(prompt)
    else:
        names = ("chosen", "rejected") if len(answers) == 2 else ("response",)
        conversations = []
        for name, answer in zip(names, answers, strict=True):
            messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            if not messages or messages[0]["role"] != "assistant":
                raise BadRowError(
                    "wrong_role",
                    f"does not begin with a message of the assistant in field {name!r}, expected the response there",
                )
            conversations.append(messages)
        conversation = reader.answers(prompt, conversations)
    if "tools_not_shown" in conversation.notes:
        columns.discard("tools")
    return conversation._replace(columns=frozenset(columns))


def _option(fields: dict[str, Any], name: str, read: Callable[[Any], Any]) -> Any:
    value = fields.get(name)
    if value is None:
        return None
    try:
        return read(value)
    except ValueError as error:
        raise BadRowError("wrong_type", f"has a wrong value in field {name!r}: {error}") from error


def _columns(fields: dict[str, Any], form: Form) -> frozenset[str]:
    read = {*FIELDS[form], "prompt", *(("weight", "margin") if form == "pair" else ())}
    return frozenset(read)


def _unused_tools(fields: dict[str, Any]) -> tuple[str, ...]:
    # Strings are used as they are, so there is no template that could show the tools.
    return ("tools_not_shown",) if fields.get("tools") else ()


def _split_common(fields: dict[str, Any], answers: list[Any], names: Sequence[str]) -> tuple[str | list[Message], list[Any]]:
    """Split the chosen and the rejected response of a row without a prompt into their common prompt and the rest of each."""
    chosen, rejected = answers
    if type(chosen) is not type(rejected):
        raise BadRowError(
            "wrong_type", f"has a string and messages in {' and '.join(names)}, expected both as strings or both as messages"
        )
    if isinstance(chosen, str):
        if chosen.strip() == rejected.strip():
            if is_blank(chosen):
                raise BadRowError("empty_response", "has an empty text in field 'chosen', expected text to train on")
            raise BadRowError("identical_pair", "has identical chosen and rejected responses, expected different ones")
        prompt, is_asked = common_turns(chosen, rejected)
        check_question(fields, "pair", answers, has_prompt=is_asked)
        if not prompt:
            raise BadRowError(
                "no_prompt", "has no field 'prompt', and its chosen and rejected responses do not begin with the same text"
            )
        rests = [chosen[len(prompt) :], rejected[len(prompt) :]]
        if any(map(is_blank, rests)):
            raise BadRowError(
                "no_prompt",
                "has no field 'prompt', and one of its responses begins the other, so the end of the prompt is unknown:"
                " expected a field 'prompt', or a line such as 'Assistant:' before the response",
            )
        return prompt, rests
    shared = [[shown(message) for message in answer] for answer in answers]
    if shared[0] == shared[1]:
        raise BadRowError("identical_pair", "has identical chosen and rejected responses, expected different ones")
    length = next((i for i, (a, b) in enumerate(zip(*shared, strict=False)) if a != b), min(map(len, shared)))
    while length > 0 and not all(side[length : length + 1] and side[length]["role"] == "assistant" for side in answers):
        length -= 1
    if length <= 0:
        _check_systems(answers)
        check_question(fields, "pair", [], has_prompt=False)
        raise BadRowError(
            "no_prompt", "has no field 'prompt', and its chosen and rejected responses have no messages of a prompt in common"
        )
    return chosen[:length], [chosen[length:], rejected[length:]]


def _text_or_messages(fields: dict[str, Any], name: str) -> str | list[Message]:
    value = fields[name]
    return value if isinstance(value, str) else _messages(fields, name)


def _messages(fields: dict[str, Any], name: str) -> list[Message]:
    value = fields[name]
    if not isinstance(value, list):
        wanted = "a list of messages" if name == "messages" else "a string or a list of messages"
        raise BadRowError("wrong_type", f"has a value of type {type(value).__name__} in field {name!r}, expected {wanted}")
    try:
        return list(normalize_messages(value))
    except ValueError as error:
        raise BadRowError("wrong_type", f"has a bad message in field {name!r}: {error}") from error


def first_form(rows: Iterable[Row], accepted: Sequence[Form]) -> Form | None:
    """Return the form of the first row that has one, or None."""
    for row in rows:
        try:
            return form_of(row.fields, accepted=accepted)
        except BadRowError:
            continue
    return None
