"""The answer file of another engine, checked row by row."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_align.generation.answers import close_answer
from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import Generation

Request = Mapping[str, Any]
EXPECTED = 'Expected {"id", "responses": [{"tokens", "reason"}]}'


class IncompleteError(ValueError):
    """Rows are missing, so the engine may still be writing."""


def read_responses(
    path: Path, requests: Sequence[Request], known: Sequence[int], ends: Ends, *, vocabulary: int | None
) -> list[list[Generation]]:
    """Read the responses to requests.

    Args:
        path: The file.
        requests: The rows to return, with `id`, `max_tokens` and `num_samples`.
        known: The ids of all prompts that the engine was asked, which may be more.
        ends: How responses end, and which ids exist.
        vocabulary: V, the number of ids of the model. None if it is unknown.

    Returns:
        The responses to each request.

    Raises:
        IncompleteError: If rows are missing, or the last one is not complete.
        ValueError: If a row is wrong. The message names the row and what to do.
    """
    asked = {request["id"]: request for request in requests}
    everything, found, places = set(known), dict[int, list[Generation]](), dict[int, int]()
    lines = path.read_text(encoding="utf-8").split("\n")
    complete = lines[-1] == ""
    for number, line in enumerate(lines[:-1] if complete else lines, start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # without a line break
                raise IncompleteError(
                    f"{where} ends in the middle of a row. Let the engine write another file and rename it when it is complete."
                ) from error
            raise ValueError(f"{where} is not a valid row ({error}). {EXPECTED}. Write the row again.") from error
        prompt = row.get("id") if isinstance(row, dict) else None
        if not isinstance(row, dict) or not _is_id(prompt) or not isinstance(row.get("responses"), list):
            raise ValueError(f"{where} is not a valid row. {EXPECTED}, but got {_short(line)}. Write the row again.")
        assert isinstance(prompt, int)
        if prompt not in everything:
            raise ValueError(
                f"{where} answers prompt {prompt}, which was not asked. Remove the row, or check that the engine read the "
                "prompts file of the same name."
            )
        if prompt in places:
            raise ValueError(f"{where} answers prompt {prompt} again, after line {places[prompt]}. Remove one of the two rows.")
        places[prompt] = number
        if prompt in asked:
            found[prompt] = _read_row(where, row["responses"], asked[prompt], ends, vocabulary)
    if missing := [prompt for prompt in asked if prompt not in found]:
        raise IncompleteError(
            f"{path} has no row for {len(missing)} of {len(asked)} prompts, such as prompt {missing[0]}. Add the missing rows."
        )
    return [found[request["id"]] for request in requests]


def _read_row(where: str, responses: list[Any], request: Request, ends: Ends, vocabulary: int | None) -> list[Generation]:
    if len(responses) != request["num_samples"]:
        raise ValueError(
            f"{where} has {len(responses)} responses to prompt {request['id']}. Expected {request['num_samples']}. Generate "
            "with `n` of the settings file, and write all responses into one row."
        )
    return [
        check_answer(f"{where}, response {sample}", answer, int(request["max_tokens"]), ends, vocabulary)
        for sample, answer in enumerate(responses)
    ]


def check_answer(where: str, answer: Any, limit: int, ends: Ends, vocabulary: int | None) -> Generation:
    """Check a response of another engine, and bring it into the form of our own sampler.

    Args:
        where: What the message of an error begins with.
        answer: A dictionary with `tokens` and `reason`, and perhaps `logprobs` and `end`.
        limit: The maximum number of tokens, including the end-of-sequence token.
        ends: How responses end, and which ids exist.
        vocabulary: V, the number of ids of the model. None if it is unknown.

    Raises:
        ValueError: If something is wrong.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("tokens"), list) or "reason" not in answer:
        raise ValueError(f"{where} is not valid. {EXPECTED}, but got {_short(json.dumps(answer))}.")
    tokens, reason, logprobs = answer["tokens"], answer["reason"], answer.get("logprobs") or []
    bad = [token for token in tokens if not _is_id(token) or (vocabulary is not None and not 0 <= token < vocabulary)]
    if bad:
        most = "" if vocabulary is None else f" from 0 to {vocabulary - 1}"
        raise ValueError(
            f"{where}: `tokens` must be ids{most}, but got {bad[0]!r}. Check that the engine opened the model of this folder."
        )
    if reason == "stop" and ends.stop is None:
        raise ValueError(
            f"{where}: `reason` is 'stop', but there are no stop texts. Write 'eos' if an end-of-sequence id "
            "ended the response."
        )
    if not all(isinstance(value, (int, float)) and math.isfinite(value) and value < 1e-3 for value in logprobs):
        raise ValueError(f"{where}: `logprobs` must be finite and at most 0. Write the natural logarithm of each probability.")
    try:
        closed = close_answer(tokens, reason, ends, logprobs=logprobs, end=answer.get("end"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    length = len(closed.tokens) + (closed.reason == "eos")
    if length > limit:
        raise ValueError(
            f"{where} has {length} tokens, with its end. Expected at most {limit}. Generate with `max_tokens` of the prompt."
        )
    if reason == "stop" and closed.reason == "length":
        raise ValueError(
            f"{where}: `reason` is 'stop', but the tokens contain none of the stop texts. Keep the text in the "
            "response (`include_stop_str_in_output` of vLLM)."
        )
    if reason == "length" and closed.reason == "length" and len(tokens) < limit:
        raise ValueError(
            f"{where}: `reason` is 'length', but it has only {len(tokens)} of at most {limit} tokens. Give the engine a longer "
            "context (`max_model_len` of vLLM), or write the reason that ended the response."
        )
    return closed


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
