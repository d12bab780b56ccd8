"""The forms that a row may have, read into turns: what is given, and what is said in answer.

========================================  ==========================================================================
form                                      fields
========================================  ==========================================================================
``response``                              ``prompt``, ``response``
``pair``                                  ``prompt``, ``chosen``, ``rejected``; or the last two, which then begin alike
``messages``                              ``messages``
``text``                                  ``text``
``prompt``                                ``prompt``, or any of the forms above but ``text`` and pairs
========================================  ==========================================================================

A prompt, a response, a chosen and a rejected answer are strings, used as they are, or lists of messages, written by the
tokenizer's chat template.
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
    """What stands before a response, and the response."""

    context: str
    response: str
    trained: bool
    """Whether the response is a target."""
    eos: bool
    """Whether an end-of-sequence id follows that is not in the text."""
    context_trained: bool = False
    """Whether the context is a target too, which only ``mask_turns="all"`` asks for."""


class Conversation(NamedTuple):
    """A row in turns. The prompt is all that stands before the response of each side's first turn."""

    history: list[Turn]
    """Turns of the prompt that are over."""
    context: str
    """What stands between them and the answer; the context of each side's first turn."""
    sides: list[list[Turn]]
    """No answer (a prompt), one, or the chosen and the rejected."""
    templated: bool
    """Whether a chat template wrote it."""
    notes: tuple[str, ...] = ()


class BadRowError(ValueError):
    """A row that cannot be used: the reason it is counted under, and what is wrong with it."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason
        self.problem = problem


def form_of(fields: dict[str, Any], *, accepted: Sequence[Form]) -> Form:
    """The first of the accepted forms whose fields a row has; a field that is null counts as absent.

    Raises:
        BadRowError: If it has none.
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
    """Reads a row of any form but ``text`` into turns.

    Args:
        fields: The row.
        form: Its form, as `form_of` tells it.
        tokenizer: Whose chat template writes messages.
        mask_turns: Which turns are targets; see `lightning_align.data.encode.encode_rows`.

    Raises:
        BadRowError: If a field is of the wrong type or empty, or the template refuses the messages.
    """
    if form == "messages":
        return _read_messages(_messages(fields, "messages"), tokenizer=tokenizer, mask_turns=mask_turns)
    names = {"pair": ("chosen", "rejected"), "response": ("response",), "prompt": ()}[form]
    answers = [_text_or_messages(fields, name) for name in names]
    prompt = None if fields.get("prompt") is None else _text_or_messages(fields, "prompt")
    if isinstance(prompt, str) and answers and all(isinstance(answer, list) for answer in answers):
        # A common layout: the prompt as a string, and again as the first message of each answer.
        firsts = [answer[0]["content"] for answer in answers if isinstance(answer, list) and answer]
        if len(firsts) == len(answers) and all(first == prompt for first in firsts):
            prompt = None
            if len(answers) == 1:
                prompt, answers = answers[0][:1], [answers[0][1:]]
        else:
            raise BadRowError("wrong_type", "has a prompt that is a string and answers that are messages, expected both alike")
    if prompt is None:
        prompt, answers = _split_common(answers, names)
    if isinstance(prompt, str):
        return _read_strings(prompt, answers, names)
    return _read_chat(prompt, answers, names, tokenizer=tokenizer, mask_turns=mask_turns)


def read_prompt(fields: dict[str, Any], *, form: Form, tokenizer: Tokenizer) -> Conversation:
    """Reads what a row gives to answer: its prompt, or of its messages those before a last answer of the assistant.

    Raises:
        BadRowError: As `read_conversation`.
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
    """The prompt as text."""
    return "".join(turn.context + turn.response for turn in conversation.history) + conversation.context


def side_text(side: Sequence[Turn]) -> str:
    """An answer as text, without the prompt."""
    return side[0].response + "".join(turn.context + turn.response for turn in side[1:])


def common_prefix(first: str, second: str) -> str:
    """The text that both begin with, cut back so that the rest begins with a whole word and the space before it."""
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    following = (first[length : length + 1], second[length : length + 1])
    # Inside a word on either side, or before a mark that belongs to the character in front of it.
    if length and any(character and _continues(first[length - 1], character) for character in following):
        length -= 1
        while length and _continues(first[length - 1], first[length]):
            length -= 1
    # Tokens of words carry the space in front of them.
    if length and first[length - 1] == " ":
        length -= 1
    return first[:length]


def _continues(before: str, character: str) -> bool:
    if unicodedata.combining(character) or character in "\u200d\ufe0f" or before == "\u200d":
        return True
    return _is_word(before) and _is_word(character)


def _is_word(character: str) -> bool:
    # Chinese and Japanese write no spaces: there each character stands for itself.
    return (character.isalnum() or character == "_") and not 0x2E80 <= ord(character) <= 0x9FFF


def _read_strings(prompt: str, answers: list[Any], names: Sequence[str]) -> Conversation:
    for name, answer in zip(names, answers, strict=True):
        if not isinstance(answer, str):
            raise BadRowError(
                "wrong_type", f"has a prompt that is a string and messages in field {name!r}, expected both alike"
            )
        if not answer.strip():
            raise BadRowError("empty_response", f"has nothing in field {name!r}, expected some text to learn")
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
            raise BadRowError("wrong_role", f"has no assistant at the beginning of field {name!r}, expected its answer there")
        sides.append(_read_messages([*prompt, *messages], tokenizer=tokenizer, mask_turns=mask_turns, num_given=len(prompt)))
    if any(side.context != sides[0].context or side.history != sides[0].history for side in sides):
        raise BadRowError("chat_template", "has a prompt that the chat template writes differently for its two answers")
    notes = tuple(note for side in sides for note in side.notes)
    return sides[0]._replace(sides=[side.sides[0] for side in sides], notes=notes)


def _read_messages(
    messages: list[Message], *, tokenizer: Tokenizer, mask_turns: MaskTurns, num_given: int | None = None
) -> Conversation:
    """Reads a whole conversation, of which the first ``num_given`` messages are the prompt (None: ``mask_turns`` decides)."""
    speakers = [message["role"] == "assistant" for message in messages]
    if not any(speakers):
        raise BadRowError("no_assistant_turn", "has no message of an assistant, expected one to learn")
    # What others say after the last answer bears on no target.
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
        raise BadRowError("empty_response", "has an assistant who says nothing, expected some text to learn")
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
        raise BadRowError("chat_template", f"cannot be written by the chat template: {error}") from error


def _split_common(answers: list[Any], names: Sequence[str]) -> tuple[Any, list[Any]]:
    """The prompt that chosen and rejected have in common, and what is left of each."""
    chosen, rejected = answers
    if type(chosen) is not type(rejected):
        raise BadRowError("wrong_type", f"has a string and messages in {' and '.join(names)}, expected both alike")
    if isinstance(chosen, str):
        prompt = common_prefix(chosen, rejected)
        if not prompt and chosen != rejected:
            raise BadRowError("no_prompt", "has no field 'prompt', and its chosen and rejected do not begin with the same text")
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
            "no_prompt", "has no field 'prompt', and chosen and rejected have no message before an answer in common"
        )
    return chosen[:length], [chosen[length:], rejected[length:]]


def _text_or_messages(fields: dict[str, Any], name: str) -> str | list[Message]:
    value = fields[name]
    return value if isinstance(value, str) else _messages(fields, name)


def _messages(fields: dict[str, Any], name: str) -> list[Message]:
    value = fields[name]
    if not isinstance(value, list):
        wanted = "a list of messages" if name == "messages" else "a string or a list of messages"
        raise BadRowError("wrong_type", f"has a {type(value).__name__} in field {name!r}, expected {wanted}")
    try:
        check_messages(value)
    except ValueError as error:
        raise BadRowError("wrong_type", f"has in field {name!r}: {error}") from error
    return value
