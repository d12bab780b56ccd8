"""Encoding of rows as token ids: boundaries, special tokens, targets and length limits.

Three rules hold for every encoded row.

1. The ids of the prompt are those of the prompt encoded alone. Training therefore sees what generation sees, and both
   sides of a pair have exactly the same prompt.
2. No token is part of both prompt and response. The prompt and the response are encoded together, and the ids of the
   response are those after the ids of the prompt. If a token would cross the boundary, the response is encoded alone.
3. The targets are the tokens that the model should generate: the response and its end-of-sequence id. The ledger counts
   each row that is trimmed or dropped.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from lightning_align.data.conversations import BadRowError, Conversation, MaskTurns, Turn, restore
from lightning_align.data.forms import Form, form_of, read_conversation, read_prompt, side_text
from lightning_align.data.ledger import KEPT, PROMPT_TRIMMED, RESPONSE_TRIMMED, Ledger
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import Encoding, Tokenizer, all_ends
from lightning_align.data.unread import unread_columns

Truncation = Literal["keep_start", "keep_end", "drop"]
_ROWS_PER_CALL = 256
T = TypeVar("T")


class EncodedTokens(NamedTuple):
    """One sequence of tokens."""

    tokens: list[int]
    targets: list[bool]
    """True at the trained tokens. As long as ``tokens``."""
    num_bytes: int
    """The number of UTF-8 bytes of the text of the targets."""


class EncodedRow(NamedTuple):
    """A row as token ids."""

    row: int
    """The index of the row in its source, from 0."""
    num_prompt: int
    """The number of prompt tokens. Each side begins with them."""
    sides: list[EncodedTokens]
    """One response, or the chosen and the rejected response. A prompt without a response is one side without targets."""
    weight: float = 1.0
    """The factor of a pair's loss."""
    margin: float = 0.0
    """The margin by which the reward of the chosen response should exceed that of the rejected response."""


class _Span(NamedTuple):
    """A text of a response with its ids."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """The character offsets of each id of the text. Ids that were appended, such as end-of-sequence, have none."""
    origin: int
    """The offset at which the text begins."""
    text: str
    is_target: bool
    stand_ins: Mapping[str, str]
    """The texts that characters of the text stand for."""


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
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[EncodedRow]:
    """Encode rows and count each of them in the ledger.

    Args:
        rows: The rows, in order.
        tokenizer: The tokenizer.
        ledger: The ledger that counts the rows.
        accepted: The forms that a row may have. The first form that a row matches is used.
        max_length: The maximum number of tokens of a row, prompt and response together.
        truncation: How to shorten a row that is too long. ``keep_start`` removes the end of the response, including its
            end-of-sequence id. ``keep_end`` removes the beginning of the prompt, after the beginning-of-sequence id, and
            removes the same number of tokens from both sides of a pair. ``drop`` drops the row.
        mask_turns: Which turns of the response are targets: ``last_turn`` is the last turn of the assistant,
            ``assistant_only`` is all turns of the assistant, and ``all`` is everything after the prompt. Rows of messages
            have no field for the prompt. Their response is the last turn of the assistant with ``last_turn``, everything
            from the first turn of the assistant with ``assistant_only``, and the whole conversation with ``all``.
        prompts_only: Whether to encode only the prompts.
        chat_template_kwargs: Variables of the chat template. Those of a row have priority.

    Raises:
        ValueError: If a row is bad and the ledger has ``on_bad_row="fail"``, or there are variables but no chat template.
    """
    if chat_template_kwargs and not tokenizer.has_template:
        raise ValueError(
            f"`chat_template_kwargs` must be empty, but got {dict(chat_template_kwargs)}: the tokenizer has no chat template."
            " Use a tokenizer of transformers that has one."
        )
    seen: set[int] = set()
    for chunk in chunks(enumerate(rows)):
        conversations: list[tuple[int, str, Conversation, tuple[float, float]]] = []
        for index, row in chunk:
            try:
                conversation = _read(row, accepted, tokenizer, mask_turns, prompts_only, chat_template_kwargs)
                for name in unread_columns(row.fields, conversation.columns):
                    ledger.skip_column(name)
                numbers = _pair_numbers(row) if len(conversation.sides) == 2 else (1.0, 0.0)
            except BadRowError as error:
                ledger.drop(error.reason, origin=row.origin, problem=error.problem)
                continue
            conversations.append((index, row.origin, conversation, numbers))
        encoder = _Encoder(tokenizer, [conversation for _, _, conversation, _ in conversations])
        for index, origin, conversation, (weight, margin) in conversations:
            try:
                answer = encoder.encode(conversation)
                result, outcome = _fit(answer, max_length=max_length, truncation=truncation, ends=all_ends(tokenizer))
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


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield the items in lists of 256, the number that the tokenizer encodes in one call."""
    rest = iter(items)
    while chunk := list(islice(rest, _ROWS_PER_CALL)):
        yield chunk


def _read(
    row: Row,
    accepted: Sequence[Form],
    tokenizer: Tokenizer,
    mask_turns: MaskTurns,
    prompts_only: bool,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> Conversation:
    if row.problem:
        raise BadRowError("unreadable", row.problem)
    form = form_of(row.fields, accepted=accepted)
    if prompts_only:
        return read_prompt(row.fields, form=form, tokenizer=tokenizer, chat_template_kwargs=chat_template_kwargs)
    conversation = read_conversation(
        row.fields, form=form, tokenizer=tokenizer, mask_turns=mask_turns, chat_template_kwargs=chat_template_kwargs
    )
    if len(conversation.sides) == 2 and side_text(conversation) == side_text(conversation, 1):
        raise BadRowError("identical_pair", "has identical chosen and rejected responses, expected different ones")
    return conversation


def _pair_numbers(row: Row) -> tuple[float, float]:
    """Read the fields ``weight`` and ``margin`` of a row. Their defaults are 1 and 0."""

    def read(name: str, default: float, least: float, expected: str) -> float:
        value = row.fields.get(name)
        if value is None or value == "":
            return default
        try:
            # All fields of a CSV file are strings.
            number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and number >= least):
            raise BadRowError("wrong_type", f"has {value!r} in field {name!r}, expected {expected}")
        return number

    return read("weight", 1.0, 0.0, "a number that is 0 or above"), read("margin", 0.0, -math.inf, "a number")


class _Answer(NamedTuple):
    """A conversation as token ids, before the length limit is applied."""

    prompt: list[int]
    num_bos: int
    sides: list[list[_Span]]
    notes: set[str]


class _Encoder:
    """An encoder of the conversations of a chunk. It calls the tokenizer once for all their texts."""

    def __init__(self, tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> None:
        self.tokenizer = tokenizer
        texts: dict[str, None] = {}
        literal: dict[str, Mapping[str, str]] = {}
        for conversation in conversations:
            before = len(texts)
            texts[conversation.context] = None
            for turns in (conversation.history, *conversation.sides):
                for turn in turns:
                    texts[turn.context] = texts[turn.context + turn.response] = None
            if conversation.stand_ins:
                literal |= dict.fromkeys(list(texts)[before:], conversation.stand_ins)
        self._encoded = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))
        for text, stand_ins in literal.items():
            self._encoded[text] = _encode_literally(tokenizer, text, stand_ins)

    def encode(self, conversation: Conversation) -> _Answer:
        notes = set(conversation.notes)
        prompt: list[int] = []
        for turn in conversation.history:
            prompt += self._encoded[turn.context].ids
            prompt += self._response(turn, notes, conversation.stand_ins).ids
        prompt, doubled = with_bos(prompt + self._encoded[conversation.context].ids, self.tokenizer)
        # A chat template may write the beginning-of-sequence token itself. Only a second one is noted.
        num_twice = 2 if conversation.templated else 1
        if doubled >= num_twice:
            notes.add("double_bos")
        sides, stand_ins = [], conversation.stand_ins
        for turns in conversation.sides:
            spans = [self._response(turns[0], notes, stand_ins)]
            for turn in turns[1:]:
                context = self._encoded[turn.context]
                spans.append(_Span(context.ids, context.offsets, 0, turn.context, turn.context_trained, stand_ins))
                spans.append(self._response(turn, notes, stand_ins))
            sides.append(spans)
        if sides and conversation.sides[0][0].context_trained:
            # With `all`, everything but the first token is a target: the rest of the prompt becomes part of each response.
            context = self._encoded[conversation.context]
            num_start = max(1, int(self.tokenizer.bos_id is not None))
            num_skipped = len(context.ids) - (len(prompt) - num_start)
            rest = _Span(prompt[num_start:], context.offsets[num_skipped:], 0, conversation.context, True, stand_ins)
            prompt, sides = prompt[:num_start], [[rest, *spans] for spans in sides]
        num_bos = int(self.tokenizer.bos_id is not None)
        self._check_ids([prompt, *(span.ids for spans in sides for span in spans)])
        return _Answer(prompt, num_bos, sides, notes)

    def _response(self, turn: Turn, notes: set[str], stand_ins: Mapping[str, str]) -> _Span:
        context, joint = self._encoded[turn.context], self._encoded[turn.context + turn.response]
        num_context, boundary = len(context.ids), len(turn.context)
        ids, offsets, origin = joint.ids[num_context:], joint.offsets[num_context:], boundary
        starts_alike = joint.ids[:num_context] == context.ids
        if not starts_alike or (ids and offsets[0][0] < boundary):
            notes.add("merged_boundary")
            ids, offsets = _encode_literally(self.tokenizer, turn.response, stand_ins)
            origin = 0
        if self.tokenizer.bos_id is not None and ids[:1] == [self.tokenizer.bos_id]:
            notes.add("double_bos")
            ids, offsets = ids[1:], offsets[1:]
        if turn.eos:
            ids = with_eos(ids, self.tokenizer)
        if turn.trained and not set(all_ends(self.tokenizer)).isdisjoint(ids[:-1]):
            # Strings are used as they are, so a response can contain the token. The model learns to stop there.
            notes.add("end_token_inside")
        return _Span(ids, offsets, origin, turn.response, turn.trained, stand_ins)

    def _check_ids(self, parts: list[list[int]]) -> None:
        for ids in parts:
            if ids and not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
                raise ValueError(
                    f"the tokenizer produced ids from {min(ids)} to {max(ids)}, but its vocabulary size is "
                    f"{self.tokenizer.vocab_size}."
                    " The tokenizer file is damaged. Write or download it again."
                )


def _encode_literally(tokenizer: Tokenizer, text: str, stand_ins: Mapping[str, str]) -> Encoding:
    """Encode a text whose characters may stand for the texts of special tokens, such that these do not become the tokens.

    The text is encoded in parts. Each special token's text is split behind its first character, so no part contains it.
    """
    parts = [""]
    positions: list[list[int]] = [[]]
    for position, character in enumerate(text):
        literal = stand_ins.get(character, character)
        parts[-1] += literal[0]
        positions[-1].append(position)
        if len(literal) > 1:
            parts.append(literal[1:])
            positions.append([position] * (len(literal) - 1))
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for encoding, places in zip(tokenizer.encode_batch(parts), positions, strict=True):
        ids += encoding.ids
        offsets += [(places[start], places[end - 1] + 1) if end > start else (0, 0) for start, end in encoding.offsets]
    return Encoding(ids, offsets)


def with_bos(ids: list[int], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Make the ids begin with exactly one beginning-of-sequence id, if the tokenizer has one.

    Returns:
        The ids, and the number of beginning-of-sequence ids that they had before.
    """
    bos = tokenizer.bos_id
    if bos is None:
        return ids, 0
    num_bos = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[num_bos:]], num_bos


def with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Make the ids end with exactly one end-of-sequence id."""
    num_ids = len(ids)
    while num_ids and ids[num_ids - 1] == tokenizer.eos_id:
        num_ids -= 1
    return [*ids[:num_ids], tokenizer.eos_id]


def _fit(answer: _Answer, *, max_length: int, truncation: Truncation, ends: Collection[int]) -> tuple[EncodedRow, str]:
    """Trim a conversation to at most ``max_length`` tokens.

    Returns:
        The row, and its outcome for the ledger.

    Raises:
        BadRowError: If the row has to be dropped.
    """
    prompt = answer.prompt
    lengths = [sum(len(span.ids) for span in spans) for spans in answer.sides] or [0]
    num_over = len(prompt) + max(lengths) - max_length
    outcome = KEPT
    total = ""
    if num_over > 0:
        total = f"has {len(prompt)} prompt and {max(lengths)} response tokens, but max_length is {max_length}"
        if truncation == "drop":
            raise BadRowError("too_long", total)
        if truncation == "keep_end":
            if len(prompt) - num_over < answer.num_bos + 1:
                raise BadRowError("response_too_long", f"{total}, which leaves no token for the prompt")
            prompt = prompt[: answer.num_bos] + prompt[answer.num_bos + num_over :]
            outcome = PROMPT_TRIMMED
        else:
            if len(prompt) >= max_length or not answer.sides:
                raise BadRowError("prompt_too_long", f"{total}, which leaves no token for the response")
            outcome = RESPONSE_TRIMMED
    sides = [_flatten(prompt, spans, room=max_length - len(prompt), ends=ends) for spans in answer.sides]
    for side in sides:
        if not any(side.targets):
            # Prompt tokens are never targets. Nor is the first token of a sequence, because nothing predicts it.
            if outcome == RESPONSE_TRIMMED:
                raise BadRowError("prompt_too_long", "has no target within max_length")
            raise BadRowError("empty_response", "has no target, because its prompt and its response are empty")
    if len(sides) == 2 and sides[0].tokens == sides[1].tokens:
        if outcome == RESPONSE_TRIMMED:
            raise BadRowError("response_too_long", f"{total}, and its chosen and rejected responses are identical up to there")
        raise BadRowError("identical_pair", "has chosen and rejected responses with identical token ids")
    if not sides:
        if not prompt:
            raise BadRowError("empty_prompt", "has an empty prompt, and the tokenizer has no beginning-of-sequence token")
        sides = [EncodedTokens(prompt, [False] * len(prompt), 0)]
    return EncodedRow(-1, len(prompt), sides), outcome


def _flatten(prompt: list[int], spans: Sequence[_Span], *, room: int, ends: Collection[int]) -> EncodedTokens:
    tokens = list(prompt)
    targets = [False] * len(prompt)
    num_bytes = 0
    for span in spans:
        ids = span.ids[: room - (len(tokens) - len(prompt))]
        tokens += ids
        targets += [span.is_target] * len(ids)
        if span.is_target and ids:
            num_spelled = min(len(ids), len(span.offsets))
            if num_spelled and ids[num_spelled - 1] in ends:
                num_spelled -= 1
            if num_spelled:
                text = span.text[: span.offsets[num_spelled - 1][1] - span.origin]
                num_bytes += len(restore(text, span.stand_ins).encode())
    targets[:1] = [False]
    return EncodedTokens(tokens, targets, num_bytes)
