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
are. Lists of messages are rendered with the chat template of the tokenizer.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from lightning_align.data.tokenizer import Message, Segment, Tokenizer, check_messages

Form = Literal["response", "pair", "messages", "text", "prompt"]
MaskTurns = Literal["last_turn", "assistant_only", "all"]

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


class Turn(NamedTuple):
    """A response and the text before it."""

    context: str
    response: str
    trained: bool
    """Whether the response is a target."""
    eos: bool
    """Whether to append an end-of-sequence id, because the text does not contain one."""
    context_trained: bool = False
    """Whether the context is a target too. Only ``mask_turns="all"`` sets it."""


class Conversation(NamedTuple):
    """A row as turns. The prompt is everything before the response of each side's first turn."""

    history: list[Turn]
    """The completed turns of the prompt."""
    context: str
    """The rest of the prompt, between the history and the response. It is the context of each side's first turn."""
    sides: list[list[Turn]]
    """The turns of each response: none for a prompt, one response, or the chosen and the rejected response."""
    templated: bool
    """Whether a chat template rendered the texts."""
    notes: tuple[str, ...] = ()
    """The notes that the ledger counts for the row."""


class BadRowError(ValueError):
    """An error in a row that makes it unusable.

    Args:
        reason: The name under which the ledger counts the row.
        problem: What is wrong with the row.
    """

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason
        self.problem = problem


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
    missing = min(([name for name in FIELDS[form] if name not in present] for form in accepted), key=len)
    raise BadRowError(
        "missing_field",
        f"has no field {' and no field '.join(map(repr, missing))} (it has "
        f"{', '.join(map(repr, sorted(present))) or 'none'}):"
        f" expected {' or '.join(DESCRIPTIONS[form] for form in accepted)}",
    )


def read_conversation(fields: dict[str, Any], *, form: Form, tokenizer: Tokenizer, mask_turns: MaskTurns) -> Conversation:
    """Convert a row of any form except ``text`` to turns.

    Args:
        fields: The row.
        form: The form of the row, as returned by `form_of`.
        tokenizer: The tokenizer that renders messages with its chat template.
        mask_turns: Which turns are targets. See `lightning_align.data.encode.encode_rows`.

    Raises:
        BadRowError: If a field has the wrong type or is empty, or the template rejects the messages.
    """
    if form == "messages":
        return _read_messages(_messages(fields, "messages"), tokenizer=tokenizer, mask_turns=mask_turns)
    names = {"pair": ("chosen", "rejected"), "response": ("response",), "prompt": ()}[form]
    answers = [_text_or_messages(fields, name) for name in names]
    prompt = None if fields.get("prompt") is None else _text_or_messages(fields, "prompt")
    if isinstance(prompt, str) and answers and all(isinstance(answer, list) for answer in answers):
        # A common layout: the prompt is a string, and the first message of each response repeats it.
        firsts = [answer[0]["content"] for answer in answers if isinstance(answer, list) and answer]
        if len(firsts) == len(answers) and all(first == prompt for first in firsts):
            prompt = None
            if len(answers) == 1:
                prompt, answers = answers[0][:1], [answers[0][1:]]
        else:
            raise BadRowError(
                "wrong_type", "has a string as prompt and messages as responses, expected both as strings or both as messages"
            )
    if prompt is None:
        prompt, answers = _split_common(answers, names)
    if isinstance(prompt, str):
        return _read_strings(prompt, answers, names)
    return _read_chat(prompt, answers, names, tokenizer=tokenizer, mask_turns=mask_turns)


def read_prompt(fields: dict[str, Any], *, form: Form, tokenizer: Tokenizer) -> Conversation:
    """Convert the prompt of a row to turns.

    The prompt of a row of messages is all messages, without the last one if it is from the assistant.

    Raises:
        BadRowError: See `read_conversation`.
    """
    if form == "messages":
        messages = _messages(fields, "messages")
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        fields = {"prompt": messages}
    elif form == "pair" and fields.get("prompt") is None:
        return read_conversation(fields, form="pair", tokenizer=tokenizer, mask_turns="last_turn")._replace(sides=[])
    return read_conversation(fields, form="prompt", tokenizer=tokenizer, mask_turns="last_turn")


def prompt_text(conversation: Conversation) -> str:
    """Return the prompt as text."""
    return "".join(turn.context + turn.response for turn in conversation.history) + conversation.context


def side_text(side: Sequence[Turn]) -> str:
    """Return a response as text, without the prompt."""
    return side[0].response + "".join(turn.context + turn.response for turn in side[1:])


def common_prefix(first: str, second: str) -> str:
    """Find the common beginning of two texts.

    It is shortened so that the rest of each text begins with a whole word and the space before it.
    """
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    following = (first[length : length + 1], second[length : length + 1])
    # Shorten it if it ends inside a word of either text, or before a combining mark of its last character.
    if length and any(character and _continues(first[length - 1], character) for character in following):
        length -= 1
        while length and _continues(first[length - 1], first[length]):
            length -= 1
    # The tokens of many tokenizers include the space before a word.
    if length and first[length - 1] == " ":
        length -= 1
    return first[:length]


def _continues(before: str, character: str) -> bool:
    if unicodedata.combining(character) or character in "\u200d\ufe0f" or before == "\u200d":
        return True
    return _is_word(before) and _is_word(character)


def _is_word(character: str) -> bool:
    # Chinese and Japanese have no spaces between words, so each character counts as a word.
    return (character.isalnum() or character == "_") and not 0x2E80 <= ord(character) <= 0x9FFF


def _read_strings(prompt: str, answers: list[Any], names: Sequence[str]) -> Conversation:
    for name, answer in zip(names, answers, strict=True):
        if not isinstance(answer, str):
            raise BadRowError(
                "wrong_type",
                f"has a string as prompt and messages in field {name!r}, expected both as strings or both as messages",
            )
        if not answer.strip():
            raise BadRowError("empty_response", f"has an empty text in field {name!r}, expected text to train on")
    sides = [[Turn(prompt, answer, True, True)] for answer in answers]
    return Conversation([], prompt, sides, templated=False)


def _read_chat(
    prompt: list[Message], answers: list[Any], names: Sequence[str], *, tokenizer: Tokenizer, mask_turns: MaskTurns
) -> Conversation:
    if not answers:
        history, context = _turns(_render(tokenizer, prompt, generate=True))
        return Conversation(history, context, [], templated=True)
    sides = []
    for name, answer in zip(names, answers, strict=True):
        messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        if not messages or messages[0]["role"] != "assistant":
            raise BadRowError(
                "wrong_role", f"does not begin with a message of the assistant in field {name!r}, expected the response there"
            )
        sides.append(_read_messages([*prompt, *messages], tokenizer=tokenizer, mask_turns=mask_turns, num_given=len(prompt)))
    if any(side.context != sides[0].context or side.history != sides[0].history for side in sides):
        raise BadRowError("chat_template", "has a prompt that the chat template renders differently for the two responses")
    notes = tuple(note for side in sides for note in side.notes)
    return sides[0]._replace(sides=[side.sides[0] for side in sides], notes=notes)


def _read_messages(
    messages: list[Message], *, tokenizer: Tokenizer, mask_turns: MaskTurns, num_given: int | None = None
) -> Conversation:
    """Convert the messages of a prompt and a response to turns.

    Args:
        messages: The messages.
        tokenizer: The tokenizer that renders them.
        mask_turns: Which turns are targets.
        num_given: The number of messages that are the prompt. None: ``mask_turns`` decides.
    """
    speakers = [message["role"] == "assistant" for message in messages]
    if not any(speakers):
        raise BadRowError("no_assistant_turn", "has no message of the assistant, expected at least one to train on")
    # Messages after the last one of the assistant do not affect any target.
    last = len(speakers) - 1 - speakers[::-1].index(True)
    notes = () if last == len(messages) - 1 else ("trailing_turns",)
    turns, _ = _turns(_render(tokenizer, messages[: last + 1], generate=False))
    if num_given is None:
        num_history = len(turns) - 1 if mask_turns == "last_turn" else 0
    else:
        num_history = sum(speakers[:num_given])
    history, answer = turns[:num_history], turns[num_history:]
    context = answer[0].context
    if mask_turns == "all":
        answer = [turn._replace(context_trained=num_given is None or i > 0) for i, turn in enumerate(answer)]
    elif mask_turns == "last_turn":
        answer = [turn._replace(trained=i == len(answer) - 1) for i, turn in enumerate(answer)]
    if any(turn.trained and not turn.response.strip() for turn in answer):
        raise BadRowError("empty_response", "has an empty message of the assistant, expected text to train on")
    return Conversation([turn._replace(trained=False) for turn in history], context, [answer], templated=True, notes=notes)


def _turns(segments: Sequence[Segment]) -> tuple[list[Turn], str]:
    turns: list[Turn] = []
    context = ""
    for segment in segments:
        if segment.trained:
            turns.append(Turn(context, segment.text, True, segment.eos))
            context = ""
        else:
            context += segment.text
    return turns, context


def _render(tokenizer: Tokenizer, messages: Sequence[Message], *, generate: bool) -> list[Segment]:
    try:
        return tokenizer.render(messages, add_generation_prompt=generate)
    except ValueError as error:
        raise BadRowError("chat_template", f"cannot be rendered with the chat template: {error}") from error


def _split_common(answers: list[Any], names: Sequence[str]) -> tuple[Any, list[Any]]:
    """Split the chosen and the rejected response of a row without a prompt into their common prompt and the rest of each."""
    chosen, rejected = answers
    if type(chosen) is not type(rejected):
        raise BadRowError(
            "wrong_type", f"has a string and messages in {' and '.join(names)}, expected both as strings or both as messages"
        )
    if isinstance(chosen, str):
        prompt = common_prefix(chosen, rejected)
        if not prompt and chosen != rejected:
            raise BadRowError(
                "no_prompt", "has no field 'prompt', and its chosen and rejected responses do not begin with the same text"
            )
        return prompt, [chosen[len(prompt) :], rejected[len(prompt) :]]
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if chosen == rejected:
        length -= 1
    while length > 0 and not all(side[length : length + 1] and side[length]["role"] == "assistant" for side in answers):
        length -= 1
    if length <= 0:
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
        check_messages(value)
    except ValueError as error:
        raise BadRowError("wrong_type", f"has a bad message in field {name!r}: {error}") from error
    return value
