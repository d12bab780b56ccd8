"""From rows to token ids: boundaries, ends, masks and limits.

Three rules hold for every row that comes out.

1. The prompt's ids are those of the prompt encoded alone. Training sees what generation will see, and the two sides of
a pair
   share their prompt exactly.
2. No token is half prompt and half response. A response's ids are what follows the prompt's in the two encoded
together; where
   a token would reach over the boundary, the response is encoded alone.
3. A target is a token that the model should have written: the response with its end-of-sequence id, cut or left out
only
   where the ledger says so.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple, TypeVar

from lightning_align.data.forms import (
    BadRowError,
    Conversation,
    Form,
    MaskTurns,
    Turn,
    form_of,
    read_conversation,
    read_prompt,
    side_text,
)
from lightning_align.data.ledger import KEPT, PROMPT_TRIMMED, RESPONSE_TRIMMED, Ledger
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import Encoding, Tokenizer

Truncation = Literal["keep_start", "keep_end", "drop"]
_CHUNK = 256
T = TypeVar("T")


class EncodedTokens(NamedTuple):
    """One row of tokens."""

    tokens: list[int]
    targets: list[bool]
    """As long as ``tokens``, true at what is trained."""
    num_bytes: int
    """UTF-8 bytes of the text that the targets spell."""


class EncodedRow(NamedTuple):
    """A row as ids."""

    row: int
    """Its index in the source, from 0."""
    num_prompt: int
    """Tokens of the prompt, with which each side begins."""
    sides: list[EncodedTokens]
    """One, or the chosen and the rejected. A prompt without an answer is a side without targets."""
    weight: float = 1.0
    """Of a pair: what its loss is multiplied with."""
    margin: float = 0.0
    """Of a pair: by how much the reward of chosen should exceed that of rejected."""


class _Span(NamedTuple):
    """Where a text stands in the ids of an answer."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """The characters of each id of the text; ids that were added have none."""
    origin: int
    """The offset of the text's beginning."""
    text: str
    is_target: bool


def encode_rows(
    rows: Iterable[Row],
    *,
    tokenizer: Tokenizer,
    ledger: Ledger,
    accepted: Sequence[Form],
    max_length: int,
    truncation: Truncation,
    mask_turns: MaskTurns,
    prompts_only: bool = False,
) -> Iterator[EncodedRow]:
    """Encodes rows, and enters each of them into the ledger.

    Args:
        rows: The rows, in order.
        tokenizer: What encodes them.
        ledger: Where each row is counted.
        accepted: The forms that a row may have, preferred ones first.
        max_length: Most tokens of a row, prompt and response together.
        truncation: What becomes of a longer row. ``keep_start`` cuts the end of the response, and with it the
            end-of-sequence id; ``keep_end`` cuts the beginning of the prompt behind the beginning-of-sequence id, by
            the same number of tokens for both sides of a pair; ``drop`` drops the row.
        mask_turns: Which turns of an answer are targets: the ``last_turn`` of the assistant, all turns of the assistant
            (``assistant_only``), or ``all`` that follows the prompt, whoever says it. In rows of messages, which have
            no field for the prompt, the answer is the last turn, every turn from the assistant's first, or everything.
        prompts_only: Whether answers are left out.

    Raises:
        ValueError: If a row is broken and the ledger is to fail.
    """
    seen: set[int] = set()
    for chunk in _chunks(enumerate(rows)):
        conversations: list[tuple[int, str, Conversation, tuple[float, float]]] = []
        for index, row in chunk:
            try:
                conversation = _read(
                    row, accepted=accepted, tokenizer=tokenizer, mask_turns=mask_turns, prompts_only=prompts_only
                )
                numbers = _pair_numbers(row) if len(conversation.sides) == 2 else (1.0, 0.0)
            except BadRowError as error:
                ledger.drop(error.reason, origin=row.origin, problem=error.problem)
                continue
            conversations.append((index, row.origin, conversation, numbers))
        encoder = _Encoder(tokenizer, [conversation for _, _, conversation, _ in conversations])
        for index, origin, conversation, (weight, margin) in conversations:
            try:
                answer = encoder.encode(conversation)
                result, outcome = _fit(answer, max_length=max_length, truncation=truncation, eos_id=tokenizer.eos_id)
            except BadRowError as error:
                ledger.drop(error.reason, origin=origin, problem=error.problem)
                continue
            content = hash(tuple(tuple(side.tokens) for side in result.sides))
            notes = answer.notes | {"duplicate"} if content in seen else answer.notes
            seen.add(content)
            for note in sorted(notes):
                ledger.note(note)
            ledger.keep(outcome)
            yield result._replace(row=index, weight=weight, margin=margin)


def encode_blocks(rows: Iterable[Row], *, tokenizer: Tokenizer, ledger: Ledger, max_length: int) -> Iterator[EncodedRow]:
    """Encodes plain texts, one after the other without padding, and cuts them in blocks.

    Each text begins with the beginning-of-sequence id, where the tokenizer has one, and ends with the end-of-sequence
    id. No token is lost: the last block is shorter. All tokens of a block but its first are targets. The index of a
    block is that of the text that its first token is from.

    Args:
        rows: Rows with a field ``text``.
        tokenizer: What encodes them.
        ledger: Where each row is counted.
        max_length: Tokens of a block.

    Raises:
        ValueError: If a row is broken and the ledger is to fail.
    """
    tokens: list[int] = []
    widths: list[int] = []
    owners: list[int] = []
    for chunk in _chunks(enumerate(rows)):
        texts: list[tuple[int, str]] = []
        for index, row in chunk:
            try:
                texts.append((index, _read_text(row)))
            except BadRowError as error:
                ledger.drop(error.reason, origin=row.origin, problem=error.problem)
        for (index, text), encoding in zip(texts, tokenizer.encode_batch([text for _, text in texts]), strict=True):
            ids, doubled = _with_bos(encoding.ids, tokenizer)
            if doubled:
                ledger.note("double_bos")
            ledger.keep()
            body = _byte_widths(encoding, text)
            padding = [0] * max(0, len(ids) - len(body))
            tokens += _with_eos(ids, tokenizer)
            widths += padding + body[len(body) + len(padding) - len(ids) :]
            widths += [0] * (len(tokens) - len(widths))
            owners += [index] * (len(tokens) - len(owners))
        num_whole = len(tokens) // max_length * max_length
        for start in range(0, num_whole, max_length):
            yield _block(tokens, widths, owners, start, start + max_length)
        tokens, widths, owners = tokens[num_whole:], widths[num_whole:], owners[num_whole:]
    # A block of one token has no target.
    if len(tokens) > 1:
        yield _block(tokens, widths, owners, 0, len(tokens))


def _block(tokens: list[int], widths: list[int], owners: list[int], start: int, stop: int) -> EncodedRow:
    targets = [False] + [True] * (stop - start - 1)
    return EncodedRow(owners[start], 0, [EncodedTokens(tokens[start:stop], targets, sum(widths[start + 1 : stop]))])


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def _read_text(row: Row) -> str:
    if row.problem:
        raise BadRowError("unreadable", row.problem)
    form_of(row.fields, accepted=("text",))
    text = row.fields["text"]
    if not isinstance(text, str):
        raise BadRowError("wrong_type", f"has a {type(text).__name__} in field 'text', expected a string")
    if not text.strip():
        raise BadRowError("empty_text", "has nothing in field 'text', expected some text to learn")
    return text


def _read(
    row: Row, *, accepted: Sequence[Form], tokenizer: Tokenizer, mask_turns: MaskTurns, prompts_only: bool
) -> Conversation:
    if row.problem:
        raise BadRowError("unreadable", row.problem)
    form = form_of(row.fields, accepted=accepted)
    if prompts_only:
        return read_prompt(row.fields, form=form, tokenizer=tokenizer)
    conversation = read_conversation(row.fields, form=form, tokenizer=tokenizer, mask_turns=mask_turns)
    if len(conversation.sides) == 2 and side_text(conversation.sides[0]) == side_text(conversation.sides[1]):
        raise BadRowError("identical_pair", "has a chosen and a rejected that are the same, expected two that differ")
    return conversation


def _pair_numbers(row: Row) -> tuple[float, float]:
    """The fields ``weight`` and ``margin`` of a row, 1 and 0 where it has none."""

    def read(name: str, default: float, least: float, expected: str) -> float:
        value = row.fields.get(name)
        if value is None or value == "":
            return default
        try:
            # Fields of CSV are strings, whatever they mean.
            number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and number >= least):
            raise BadRowError("wrong_type", f"has {value!r} in field {name!r}, expected {expected}")
        return number

    return read("weight", 1.0, 0.0, "a number, 0 or above"), read("margin", 0.0, -math.inf, "a number")


class _Answer(NamedTuple):
    """A conversation as ids, of any length."""

    prompt: list[int]
    num_bos: int
    sides: list[list[_Span]]
    notes: set[str]


class _Encoder:
    """Encodes the conversations of a chunk with one call of the tokenizer for all their texts."""

    def __init__(self, tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> None:
        self.tokenizer = tokenizer
        texts: dict[str, None] = {}
        for conversation in conversations:
            texts[conversation.context] = None
            for turns in (conversation.history, *conversation.sides):
                for turn in turns:
                    texts[turn.context] = texts[turn.context + turn.response] = None
        self._encoded = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))

    def encode(self, conversation: Conversation) -> _Answer:
        notes = set(conversation.notes)
        prompt: list[int] = []
        for turn in conversation.history:
            prompt += self._encoded[turn.context].ids
            prompt += self._response(turn, notes).ids
        prompt, doubled = _with_bos(prompt + self._encoded[conversation.context].ids, self.tokenizer)
        # A chat template that writes the beginning-of-sequence token is no mistake of the row.
        num_twice = 2 if conversation.templated else 1
        if doubled >= num_twice:
            notes.add("double_bos")
        sides = []
        for turns in conversation.sides:
            spans = [self._response(turns[0], notes)]
            for turn in turns[1:]:
                context = self._encoded[turn.context]
                spans.append(_Span(context.ids, context.offsets, 0, turn.context, turn.context_trained))
                spans.append(self._response(turn, notes))
            sides.append(spans)
        if sides and conversation.sides[0][0].context_trained:
            # Nothing is given but the beginning: the prompt is a part of every answer.
            context = self._encoded[conversation.context]
            num_start = max(1, int(self.tokenizer.bos_id is not None))
            num_skipped = len(context.ids) - (len(prompt) - num_start)
            rest = _Span(prompt[num_start:], context.offsets[num_skipped:], 0, conversation.context, True)
            prompt, sides = prompt[:num_start], [[rest, *spans] for spans in sides]
        num_bos = int(self.tokenizer.bos_id is not None)
        self._check_ids([prompt, *(span.ids for spans in sides for span in spans)])
        return _Answer(prompt, num_bos, sides, notes)

    def _response(self, turn: Turn, notes: set[str]) -> _Span:
        context, joint = self._encoded[turn.context], self._encoded[turn.context + turn.response]
        num_context, boundary = len(context.ids), len(turn.context)
        ids, offsets, origin = joint.ids[num_context:], joint.offsets[num_context:], boundary
        starts_alike = joint.ids[:num_context] == context.ids
        if not starts_alike or (ids and offsets[0][0] < boundary):
            notes.add("merged_boundary")
            ((ids, offsets),) = self.tokenizer.encode_batch([turn.response])
            origin = 0
        if self.tokenizer.bos_id is not None and ids[:1] == [self.tokenizer.bos_id]:
            notes.add("double_bos")
            ids, offsets = ids[1:], offsets[1:]
        if turn.eos:
            ids = _with_eos(ids, self.tokenizer)
        return _Span(ids, offsets, origin, turn.response, turn.trained)

    def _check_ids(self, parts: list[list[int]]) -> None:
        for ids in parts:
            if ids and not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
                raise ValueError(
                    f"the tokenizer gives ids from {min(ids)} to {max(ids)}, but says that it has "
                    f"{self.tokenizer.vocab_size}:"
                    " its file is damaged; write or fetch it again"
                )


def _with_bos(ids: list[int], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids with the beginning-of-sequence id in front, once, and how often they had it already."""
    bos = tokenizer.bos_id
    if bos is None:
        return ids, 0
    num_bos = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[num_bos:]], num_bos


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids with the end-of-sequence id behind them, once."""
    num_ids = len(ids)
    while num_ids and ids[num_ids - 1] == tokenizer.eos_id:
        num_ids -= 1
    return [*ids[:num_ids], tokenizer.eos_id]


def _fit(answer: _Answer, *, max_length: int, truncation: Truncation, eos_id: int) -> tuple[EncodedRow, str]:
    """Cuts an answer to at most ``max_length`` tokens, or drops it by a `BadRowError`."""
    prompt = answer.prompt
    lengths = [sum(len(span.ids) for span in spans) for spans in answer.sides] or [0]
    num_over = len(prompt) + max(lengths) - max_length
    outcome = KEPT
    total = ""
    if num_over > 0:
        total = f"has {len(prompt)} prompt and {max(lengths)} response tokens, max_length is {max_length}"
        if truncation == "drop":
            raise BadRowError("too_long", total)
        if truncation == "keep_end":
            if len(prompt) - num_over < answer.num_bos + 1:
                raise BadRowError("response_too_long", f"{total}: no room for a token of the prompt")
            prompt = prompt[: answer.num_bos] + prompt[answer.num_bos + num_over :]
            outcome = PROMPT_TRIMMED
        else:
            if len(prompt) >= max_length or not answer.sides:
                raise BadRowError("prompt_too_long", f"{total}: no room for a token of the response")
            outcome = RESPONSE_TRIMMED
    sides = [_flatten(prompt, spans, room=max_length - len(prompt), eos_id=eos_id) for spans in answer.sides]
    for side in sides:
        if not any(side.targets):
            # Nothing of the prompt may be a target, and neither may the first token of a sequence: nothing predicts it.
            if outcome == RESPONSE_TRIMMED:
                raise BadRowError("prompt_too_long", "has nothing to learn within max_length")
            raise BadRowError("empty_response", "has no token to learn: its prompt and its response are empty")
    if len(sides) == 2 and sides[0].tokens == sides[1].tokens:
        if outcome == RESPONSE_TRIMMED:
            raise BadRowError("response_too_long", f"{total}: its chosen and rejected are the same so far")
        raise BadRowError("identical_pair", "has a chosen and a rejected that are the same as token ids")
    if not sides:
        if not prompt:
            raise BadRowError("empty_prompt", "has an empty prompt, and the tokenizer no token to begin with")
        sides = [EncodedTokens(prompt, [False] * len(prompt), 0)]
    return EncodedRow(-1, len(prompt), sides), outcome


def _flatten(prompt: list[int], spans: Sequence[_Span], *, room: int, eos_id: int) -> EncodedTokens:
    tokens = list(prompt)
    targets = [False] * len(prompt)
    num_bytes = 0
    for span in spans:
        ids = span.ids[: room - (len(tokens) - len(prompt))]
        tokens += ids
        targets += [span.is_target] * len(ids)
        if span.is_target and ids:
            num_spelled = min(len(ids), len(span.offsets))
            if num_spelled and ids[num_spelled - 1] == eos_id:
                num_spelled -= 1
            if num_spelled:
                num_bytes += len(span.text[: span.offsets[num_spelled - 1][1] - span.origin].encode())
    targets[:1] = [False]
    return EncodedTokens(tokens, targets, num_bytes)


def _byte_widths(encoding: Encoding, text: str) -> list[int]:
    """UTF-8 bytes of each token's characters; a character of several tokens counts for its first."""
    widths = []
    reached = 0
    for start, end in encoding.offsets:
        widths.append(len(text[max(start, reached) : end].encode()))
        reached = max(reached, end)
    return widths
