"""Locating what an assistant says in the output of a chat template.

A template is a program, and only its output is known. A turn is located by comparing outputs: the conversation before the
turn with a generation prompt, the conversation up to and including the turn, and the whole conversation.
"""

from collections.abc import Callable, Collection, Sequence

from lightning_align.data.prefixes import num_shared
from lightning_align.data.tokenizer.protocol import Message, Segment

Apply = Callable[[Sequence[Message], bool], str]
"""Renders messages, with or without a generation prompt."""


class TurnFinder:
    """A locator of the turns of the assistant in the output of a template.

    Args:
        apply: Renders messages.
        ends: The texts of the tokens that end a response, the end-of-sequence token first.
        boundary: Returns the last position up to a given one in a text at which a token ends.
    """

    def __init__(self, apply: Apply, *, ends: Sequence[str], boundary: Callable[[str, int], int]) -> None:
        self._apply = apply
        self._ends = tuple(ends)
        self._boundary = boundary

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, exact: Collection[int] | None = None
    ) -> list[Segment]:
        """Render messages and split the text at the turns of the assistant. See `Tokenizer.render`."""
        whole = self._apply(messages, add_generation_prompt)
        turns: list[tuple[int, int, int | None]] = []
        position = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            last = index == len(messages) - 1 and not add_generation_prompt
            start = self._start(messages[:index], whole)
            if start is None and last and exact is not None and list(exact) == [index]:
                # Only the last turn matters: it goes behind what the template writes at generation.
                prompt, answer = self._last(messages[:index], whole)
                whole, start, turns, position = prompt + answer, len(prompt) if prompt else None, [], 0
            end = None
            if start is not None and start >= position:
                end = len(whole) if last else self._end(messages[: index + 1], whole, start)
            if exact is None or index in exact:
                if start is None or start < position:
                    raise ValueError(f"renders message {index + 1} differently when an answer follows")
                if end is None:
                    raise ValueError(f"renders message {index + 1} differently when more messages follow")
            if start is not None and start >= position:
                turns.append((index, start, end))
                position = start if end is None else end
        return self._split(whole, turns, num_messages=len(messages))

    def _split(self, whole: str, turns: Sequence[tuple[int, int, int | None]], *, num_messages: int) -> list[Segment]:
        segments: list[Segment] = []
        position = 0
        for number, (index, start, end) in enumerate(turns):
            segments.append(Segment(whole[position:start], "user", False))
            if end is None:
                # The template writes this turn differently at other places, so its end is unknown. It is no target.
                position = turns[number + 1][1] if number + 1 < len(turns) else start
                text, closed = whole[start:position], True
            else:
                text, closed = self._cut(whole[start:end])
                position = start + len(text)
            if text or end is not None:
                eos = not closed and index == num_messages - 1
                segments.append(Segment(text, "assistant", True, eos=eos, message=index))
        segments.append(Segment(whole[position:], "user", False))
        return [segment for segment in segments if segment.text or segment.trained]

    def _cut(self, turn: str) -> tuple[str, bool]:
        """Remove what a template writes behind the end token of a turn, usually a line break.

        Only the last end token ends a turn, or the first of several in a row. The text of an answer may contain others.

        Returns:
            The turn with one end token at its end, and whether it has one.
        """
        text = turn.rstrip()
        closed = ""
        while last := next((end for end in self._ends if text.endswith(end)), ""):
            closed, text = text, text.removesuffix(last).rstrip() if len(self._ends) > 1 else text.removesuffix(last)
        return (closed, True) if closed else (turn, False)

    def _start(self, given: Sequence[Message], whole: str) -> int | None:
        """Find where the turn after the given messages begins.

        A model begins to write behind the generation prompt, so the turn begins there if the template writes the same text
        in front of an answer. Some templates open a thought in the generation prompt, and leave it out in front of an
        answer. There the turn begins behind the text that both have.
        """
        prompt = self._try(given, True)
        if prompt is not None and whole.startswith(prompt):
            return len(prompt)
        header = self._header(given, whole)
        if header is None:
            return None
        if prompt is None:
            return self._boundary(whole, len(header)) if not given else None
        length = num_shared(prompt, header)
        body = self._try(given, False)
        if body is None or length < num_shared(prompt, body):
            return None
        return self._boundary(whole, length)

    def _last(self, given: Sequence[Message], whole: str) -> tuple[str, str]:
        """Split a conversation whose messages before the last one change because of it.

        Returns:
            The generation prompt, and the text of the last message. The first is empty if it cannot be found.
        """
        prompt, body = self._try(given, True), self._try(given, False)
        header = self._header(given, whole)
        if prompt is not None and body is not None and header is not None:
            opening = prompt[num_shared(prompt, body) :]
            place = header.rfind(opening)
            if opening.strip() and place >= 0:
                return prompt, whole[place + len(opening) :]
        return "", whole

    def _header(self, given: Sequence[Message], whole: str) -> str | None:
        """Return what the template writes in front of the content of the message behind the given ones."""
        answers: list[Message] = [{"role": "assistant", "content": content} for content in ("0", "x")]
        first, second = (self._try([*given, answer], False) for answer in answers)
        if first is None or second is None:
            return None
        return whole[: min(num_shared(first, second), num_shared(first, whole))]

    def _end(self, given: Sequence[Message], whole: str, start: int) -> int | None:
        """Find where the last of the given messages ends. Only a template's end of the conversation may be missing."""
        alone = self._try(given, False)
        if alone is None:
            return None
        for text in (alone, *(alone.rstrip().removesuffix(end) for end in self._ends)):
            if len(text) > start and whole.startswith(text):
                return len(text)
        return None

    def _try(self, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
        try:
            return self._apply(messages, add_generation_prompt)
        except ValueError:
            return None
