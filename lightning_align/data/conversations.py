"""Conversations as turns: what is given, what an assistant answers, and which answers are targets.

``last_turn`` needs the boundary of the last turn only. The text before it is what the template writes for generation. With
the other values of ``mask_turns``, all turns of the assistant are located in one rendering, so the template must write a
turn in the same way wherever it is in the conversation.

A template may open a thought in its generation prompt and write an answer without it. The prompt then ends where both
texts stop being equal, and the ledger counts the row as ``generation_prompt_differs``. For a prompt that closes the thought,
set the variable of the template, such as ``chat_template_kwargs: {enable_thinking: false}``.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from typing import Any, Literal, NamedTuple

from lightning_align.data.messages import is_blank, says_something, shown, tool_names
from lightning_align.data.tokenizer import Message, Segment, Tokenizer

MaskTurns = Literal["last_turn", "assistant_only", "all"]
_STAND_INS = [chr(0xFDD0 + i) for i in range(32)]
"""Characters that Unicode reserves for use inside a program. One stands for each marker that a message mentions."""


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
    stand_ins: Mapping[str, str] = {}
    """The texts that characters of the turns stand for. They are encoded as text, even if a special token has the same."""
    columns: frozenset[str] = frozenset()
    """The names of the columns that were read."""


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


def restore(text: str, stand_ins: Mapping[str, str]) -> str:
    """Replace the characters of a text that stand for other texts."""
    return text.translate({ord(character): literal for character, literal in stand_ins.items()}) if stand_ins else text


def without_markers(text: str, tokenizer: Tokenizer) -> str:
    """Remove the texts of the special tokens that begin and end turns."""
    for marker in tokenizer.markers:
        text = text.replace(marker, "")
    return text


class ChatReader:
    """A converter of normalized messages to turns.

    Args:
        tokenizer: The tokenizer that renders the messages.
        mask_turns: Which turns are targets.
        tools: The tools of the row.
        template_kwargs: Further variables of the chat template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        mask_turns: MaskTurns,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._mask_turns = mask_turns
        self._tools = tools
        self._kwargs = template_kwargs
        self._notes: set[str] = set()
        self._escaped = False
        self._checks_tools = bool(tools)
        self._given: tuple[list[Turn], str, str] | None = None

    def prompt(self, messages: Sequence[Message]) -> Conversation:
        """Convert the messages of a prompt. The template's generation prompt follows them."""
        history, context, _ = self._prompt([self._without_end(message) for message in messages])
        return self._finish(Conversation(history, context, [], templated=True))

    def messages(self, messages: Sequence[Message]) -> Conversation:
        """Convert a conversation. ``mask_turns`` decides what of it is the prompt."""
        return self._finish(self._side(messages, None))

    def answers(self, prompt: Sequence[Message], answers: Sequence[Sequence[Message]]) -> Conversation:
        """Convert a prompt and the messages of one response, or of the chosen and the rejected one."""
        sides = [self._side([*prompt, *answer], len(prompt)) for answer in answers]
        if any(side.context != sides[0].context or side.history != sides[0].history for side in sides):
            sides = _with_one_prompt(sides)
        return self._finish(sides[0]._replace(sides=[side.sides[0] for side in sides]))

    def _finish(self, conversation: Conversation) -> Conversation:
        stand_ins = _table(self._tokenizer.markers) if self._escaped else {}
        notes = tuple(sorted(self._notes))
        return conversation._replace(notes=notes, stand_ins={character: text for text, character in stand_ins.items()})

    def _side(self, messages: Sequence[Message], num_given: int | None) -> Conversation:
        speakers = [message["role"] == "assistant" for message in messages]
        if not any(speakers[num_given or 0 :]):
            raise BadRowError("no_assistant_turn", "has no message of the assistant, expected at least one to train on")
        # Messages after the last one of the assistant do not affect any target.
        last = len(speakers) - 1 - speakers[::-1].index(True)
        if last < len(messages) - 1:
            self._notes.add("trailing_turns")
        only_last = self._mask_turns == "last_turn"
        num_prompt = num_given if num_given is not None else last if only_last else 0
        used = [self._without_end(message) for message in messages[: last + 1]]
        targets = [
            index
            for index, message in enumerate(used)
            if speakers[index] and index >= num_prompt and message.get("train", True) and (index == last or not only_last)
        ]
        if not targets:
            raise BadRowError("no_target", "has no target, because its messages are marked as not to be trained on")
        if self._mask_turns == "assistant_only":
            used = used[: targets[-1] + 1]
        for index in targets:
            if not says_something(used[index]):
                raise BadRowError("empty_response", "has an empty message of the assistant, expected text to train on")
        exact = targets if self._mask_turns != "all" else [i for i in range(num_prompt, len(used)) if speakers[i]]
        turns, _ = _turns(self._render(used, generate=False, exact=exact))
        answer = {index: turn for index, turn in turns if index >= num_prompt}
        first = next(iter(answer))
        before = "".join(turn.context + turn.response for index, turn in turns if index < num_prompt) + answer[first].context
        history: list[Turn] = []
        context = before
        if num_prompt:
            given_history, given_context, text = self._prompt(used[:num_prompt])
            if text == before:
                history, context = given_history, given_context
            else:
                self._notes.add("generation_prompt_differs")
        answer[first] = answer[first]._replace(context=context)
        self._check_answers(used, targets, answer)
        ends = (*self._tokenizer.markers, *getattr(self._tokenizer, "other_ends", ()))
        if any(ends and not answer[i].eos and not answer[i].response.rstrip().endswith(ends) for i in targets if i != last):
            # In earlier turns, gpt-oss writes another end than the one that a model writes. It is no target.
            self._notes.add("turn_without_end")
        side = [
            turn._replace(
                trained=index in targets,
                context_trained=self._mask_turns == "all"
                and (num_given is None or index != first)
                and not _follows_marked(used, index),
            )
            for index, turn in answer.items()
        ]
        return Conversation(history, context, [side], templated=True)

    def _check_answers(self, messages: Sequence[Message], targets: Collection[int], turns: Mapping[int, Turn]) -> None:
        for index in sorted(targets):
            said = _letters(self._escape(messages[index]["content"]))
            if is_blank(without_markers(turns[index].response, self._tokenizer)):
                raise BadRowError(
                    "empty_response", f"has a message {index + 1} of which the chat template writes no text to train on"
                )
            given, written = _letters(turns[index].context), _letters(turns[index].response)
            # The generation prompt may write the beginning of the content.
            if said not in written and (given + written).find(said, max(0, len(given) - len(said) + 1)) < 0:
                self._notes.add("answer_rewritten")

    def _without_end(self, message: Message) -> Message:
        """Remove end tokens that a message writes itself at its end. The template writes its own."""
        content = message["content"]
        text = content.rstrip() if message["role"] == "assistant" and self._tokenizer.markers else ""
        ends = tuple(marker for marker in self._tokenizer.markers if text.endswith(marker))
        if not ends:
            return message
        self._notes.add("end_token_in_content")
        while ends:
            text = text.removesuffix(ends[0]).rstrip()
            ends = tuple(marker for marker in self._tokenizer.markers if text.endswith(marker))
        return {**message, "content": text}

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[Turn], str, str]:
        """Return the completed turns of a prompt, the text behind them, and the text of both. It is rendered once."""
        if self._given is None:
            segments = self._render(messages, generate=True, exact=())
            turns, context = _turns(segments)
            self._given = [turn._replace(trained=False) for _, turn in turns], context, _text(segments)
        return self._given

    def _escape(self, value: Any) -> Any:
        """Replace the markers in all strings of a value. A message means their text, not the tokens."""
        markers = self._tokenizer.markers
        if not markers:
            return value
        if isinstance(value, str):
            escaped = _pattern(markers).sub(lambda found: _table(markers)[found[0]], value)
            if escaped != value:
                if any(character in value for character in _STAND_INS):
                    raise BadRowError("wrong_type", "has a special token and a character without a meaning in one text")
                self._escaped = True
            return escaped
        if isinstance(value, Mapping):
            return {name: self._escape(item) for name, item in value.items()}
        return [self._escape(item) for item in value] if isinstance(value, list) else value

    def _render(self, messages: Sequence[Message], *, generate: bool, exact: Collection[int] | None) -> list[Segment]:
        given = [shown(message) for message in messages]
        escaped = [{**self._escape(message), "role": message["role"]} for message in given]
        tools = self._escape(self._tools)
        names = [self._escape(name) for message in given for name in tool_names(message)]

        def render(messages: Sequence[Message], tools: Any) -> list[Segment]:
            options = {"tools": tools, "template_kwargs": self._kwargs, "exact": exact}
            return self._tokenizer.render(messages, add_generation_prompt=generate, **options)

        try:
            if escaped != given and not names:
                render(given, self._tools)  # a template may refuse some texts
            segments = self._render_calls(escaped, names, lambda messages: render(messages, tools))
        except ValueError as error:
            raise BadRowError("chat_template", f"cannot be rendered with the chat template: {error}") from error
        if self._checks_tools:
            self._checks_tools = False
            with suppress(ValueError):
                if _text(self._render_calls(escaped, names, lambda messages: render(messages, None))) == _text(segments):
                    self._notes.add("tools_not_shown")
        return segments

    def _render_calls(
        self, messages: Sequence[Message], names: Sequence[str], render: Callable[[Sequence[Message]], list[Segment]]
    ) -> list[Segment]:
        """Render messages such that their calls of tools are written.

        Templates differ in how they expect the arguments of a call (an object or JSON) and the content of a message that
        only calls a tool (an empty text or null). The first way in which the template writes all calls is used.
        """
        if not names:
            return render(messages)
        refusal = ValueError(f"the template does not write the call of the tool {names[0]!r}")
        try:
            # The list of the tools has their names too.
            without = _text(render([{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]))
        except ValueError:
            without = ""
        rejected: ValueError | None = None
        is_written = False
        for as_json, as_null in product((False, True), repeat=2):
            try:
                segments = render([_call_form(message, as_json=as_json, as_null=as_null) for message in messages])
            except ValueError as error:
                rejected = rejected or error
                continue
            is_written = True
            text = _text(segments)
            if all(text.count(name) > without.count(name) for name in names):
                return segments
        raise refusal if is_written or rejected is None else rejected


def _call_form(message: Message, *, as_json: bool, as_null: bool) -> Message:
    if not message.get("tool_calls"):
        return message

    def convert(call: Any) -> Any:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            return {**call, "function": convert(call["function"])}
        if isinstance(call, dict) and isinstance(call.get("arguments"), dict):
            return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        return call

    calls = [convert(call) for call in message["tool_calls"]] if as_json else message["tool_calls"]
    content = None if as_null and not message["content"] else message["content"]
    return {**message, "tool_calls": calls, "content": content}


def _with_one_prompt(sides: Sequence[Conversation]) -> list[Conversation]:
    """Give the sides of a pair the same prompt. A template may write more of an answer's beginning into one of them.

    Raises:
        BadRowError: If no prompt begins all others.
    """
    prompts = ["".join(turn.context + turn.response for turn in side.history) + side.context for side in sides]
    shortest = min(prompts, key=len)
    if not all(prompt.startswith(shortest) for prompt in prompts):
        raise BadRowError("chat_template", "has a prompt that the chat template renders differently for the two responses")
    result = []
    for prompt, side in zip(prompts, sides, strict=True):
        (first, *others) = side.sides[0]
        first = first._replace(context=shortest, response=prompt[len(shortest) :] + first.response)
        result.append(side._replace(history=[], context=shortest, sides=[[first, *others]]))
    return result


def _follows_marked(messages: Sequence[Message], index: int) -> bool:
    """Check whether a message between the one at an index and the turn of the assistant before it is not to be trained on."""
    for message in reversed(messages[:index]):
        if message["role"] == "assistant":
            return False
        if not message.get("train", True):
            return True
    return False


def _turns(segments: Sequence[Segment]) -> tuple[list[tuple[int, Turn]], str]:
    """Return the turns of the assistant with the indices of their messages, and the text behind them."""
    turns: list[tuple[int, Turn]] = []
    context = ""
    for segment in segments:
        if segment.trained:
            turns.append((segment.message, Turn(context, segment.text, True, segment.eos)))
            context = ""
        else:
            context += segment.text
    return turns, context


def _text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _letters(text: str) -> str:
    return "".join(text.split())


@cache
def _table(markers: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(markers, _STAND_INS, strict=False))


@cache
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    # The longest first: one marker may begin another.
    return re.compile("|".join(map(re.escape, sorted(_table(markers), key=len, reverse=True))))
