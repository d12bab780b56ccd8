"""Answers of other engines, checked and brought into the form of our own sampler."""

from collections.abc import Sequence

from lightning_align.generation.ends import Ends, say_once
from lightning_align.generation.sampler import FinishReason, Generation


def close_answer(
    tokens: Sequence[int], reason: str, ends: Ends, *, logprobs: Sequence[float] = (), end: int | None = None
) -> Generation:
    """Bring an answer of an engine into the form of our own sampler.

    Four rules make the answers of all engines comparable:

    1. An answer ends at its first end-of-sequence id, whatever the engine wrote behind it. Engines may include this id.
    2. An answer ends with the token that completes its first stop text.
    3. An id that the tokenizer does not have has probability 0. The answer is cut before the first one, as by a length limit,
       and `unsupported` counts those that it had.
    4. An answer that ended with ``eos`` has an end: the id that it contains, the id that the engine gives, or `Ends.own`.

    Args:
        tokens: The ids, with or without the end-of-sequence id.
        reason: What ended the answer: ``eos``, ``stop`` or ``length``.
        ends: How responses end, and which ids exist.
        logprobs: The log-prob of each id in nats, with or without that of the end-of-sequence id. May be empty.
        end: The end-of-sequence id, if the engine gives it apart from the tokens.

    Raises:
        ValueError: If the reason is another one, if `end` ends no response, or if the number of log-probs does not fit.
    """
    if reason not in ("eos", "stop", "length"):
        raise ValueError(f"`reason` must be eos, stop or length, but got {reason!r}.")
    if end is not None and end not in ends.ids:
        raise ValueError(f"`end` must be one of the end-of-sequence ids {list(ends.ids)}, but got {end}.")
    ids, values = [int(token) for token in tokens], [float(value) for value in logprobs]
    if values and len(values) not in (len(ids), len(ids) + 1):
        raise ValueError(f"`logprobs` must have one value per token, but got {len(values)} values for {len(ids)} tokens.")
    unsupported = ends.support.missing(ids)
    last = next((place for place, token in enumerate(ids) if token in ends.ids or token not in ends.support), None)
    kind: FinishReason = reason  # type: ignore[assignment]
    if ends.stop is not None:
        for place in range(len(ids) if last is None else last):
            if ends.stop.reached(ids[: place + 1]):
                return Generation(ids[: place + 1], True, values[: place + 1], "stop", None, len(unsupported))
    if last is None:
        if kind == "eos":
            end = ends.own if end is None else end
            if end is None:
                raise ValueError("`reason` is eos, but no id ends a response. Give its id, or set `eos_token`.")
        return Generation(ids, kind != "length", values, kind, end if kind == "eos" else None)
    if ids[last] in ends.ids:
        return Generation(ids[:last], True, values[: last + 1], "eos", ids[last], len(unsupported))
    say_once(
        f"An engine answered with ids that the tokenizer does not have, such as {unsupported[0]}. Their probability is 0, so "
        "these answers are cut there and counted as `unsupported`."
    )
    return Generation(ids[:last], False, values[:last], "length", None, len(unsupported))
