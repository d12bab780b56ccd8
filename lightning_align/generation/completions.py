"""Requests and answers of the completions interface of OpenAI, in the dialects of several servers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_align.generation.ends import Ends, say_once
from lightning_align.generation.handoff import engine_settings
from lightning_align.generation.responses import check_answer
from lightning_align.generation.sampler import Generation, GenerationConfig


@dataclass(frozen=True)
class Dialect:
    """What a kind of server takes.

    Args:
        name: The name.
        ids: Whether the prompt may be token ids.
        extended: Whether the server takes the arguments of vLLM.
        folder_settings: Whether filters that OpenAI does not have come from ``generation_config.json`` of the model.
    """

    name: str
    ids: bool
    extended: bool
    folder_settings: bool = False


DIALECTS = {
    "vllm": Dialect("vllm", ids=True, extended=True),
    "openai": Dialect("openai", ids=True, extended=False),
    "transformers": Dialect("transformers", ids=False, extended=False, folder_settings=True),
}
"""The dialects, in the order in which they are tried."""


def request_body(
    dialect: Dialect,
    name: str,
    prompt: Sequence[int],
    config: GenerationConfig,
    ends: Ends,
    *,
    tokenizer: Any,
    seed: int,
    limit: int,
    n: int,
) -> dict[str, Any]:
    """Build the JSON of a request.

    Args:
        dialect: What the server takes.
        name: The name of the model.
        prompt: The token ids of the prompt.
        config: The sampling settings.
        ends: How responses end.
        tokenizer: The tokenizer, for a prompt as text.
        seed: The seed of the request.
        limit: The maximum number of tokens.
        n: The number of responses.

    Raises:
        ValueError: If the server can neither take a setting nor read the prompt.
    """
    if config.quantization is not None:
        raise ValueError(
            f"`quantization` of GenerationConfig must be null with a server, but got {config.quantization!r}. A server chooses "
            "how it stores its weights. Remove the setting."
        )
    settings = engine_settings(config, ends)
    body = {
        "model": name,
        "prompt": list(prompt) if dialect.ids else _text(prompt, tokenizer),
        "max_tokens": limit,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": seed,
        "n": n,
    }
    if settings["stop"]:
        body["stop"] = settings["stop"]
    if dialect.ids:
        body["logprobs"] = 1
    filters = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    if dialect.extended:
        names = ("stop_token_ids", "include_stop_str_in_output", *filters)
        body |= {key: settings[key] for key in names}
        body |= {"logprobs": 0, "return_tokens_as_token_ids": True, "return_token_ids": True}
    on = {key: settings[key] for key, off in filters.items() if settings[key] != off and not dialect.extended}
    if not dialect.folder_settings:
        on |= {"typical_p": config.typical_p} if config.typical_p != 1 else {}
        on |= {"no_repeat_ngram_size": config.no_repeat_ngram_size} if config.no_repeat_ngram_size else {}
        if on:
            raise ValueError(
                f"The server takes requests as {dialect.name} does, which have no {', '.join(on)}. Remove these settings, or "
                "use another server."
            )
    return body


def _text(prompt: Sequence[int], tokenizer: Any) -> str:
    if tokenizer is None:
        raise ValueError("The server takes prompts only as text, which needs a tokenizer. Give the data a `tokenizer`.")
    return str(tokenizer.decode(list(prompt), skip_special=False))


def read_choice(
    where: str,
    choice: Any,
    reply: dict[str, Any],
    limit: int,
    ends: Ends,
    *,
    tokenizer: Any,
    vocabulary: int | None,
) -> Generation:
    """Read a response: its ids, what ended it, and its log-probs, as far as the server gives them.

    Ids come from ``token_ids``, from log-probs with tokens ``token_id:<id>``, or else from the text.

    Args:
        where: What the message of an error begins with.
        choice: An entry of ``choices``.
        reply: The whole answer.
        limit: The maximum number of tokens.
        ends: How responses end.
        tokenizer: The tokenizer, for a response as text.
        vocabulary: V, the number of ids of the model.

    Raises:
        ValueError: If the answer is wrong.
    """
    finish = choice.get("finish_reason") if isinstance(choice, dict) else None
    if finish not in ("stop", "length"):
        raise ValueError(f"{where}: `finish_reason` must be stop or length, but got {finish!r} from the server.")
    told = choice.get("logprobs") or {}
    values = told.get("token_logprobs") or []
    tokens = choice.get("token_ids")
    if not isinstance(tokens, list):
        names = told.get("tokens") or []
        if names and all(isinstance(name, str) and name.startswith("token_id:") for name in names):
            tokens = [int(name.removeprefix("token_id:")) for name in names]
    stop = choice.get("stop_reason")
    if not isinstance(tokens, list):
        tokens, values = _ids(where, choice, stop, tokenizer, ends), []
        # The text is cut into tokens anew, perhaps into more of them.
        tokens = tokens[:limit]
        completed = (reply.get("usage") or {}).get("completion_tokens")
        if finish == "length" and len(tokens) < limit and (completed is None or completed >= limit):
            limit = len(tokens)
    ended = bool(tokens) and tokens[-1] in ends.ids
    reason = "length" if finish == "length" and not ended else "stop" if isinstance(stop, str) and not ended else "eos"
    if reason == "eos" and not ended and len(tokens) >= limit:
        limit = len(tokens) + 1  # the text has become more tokens than the server drew
    end = stop if isinstance(stop, int) and stop in ends.ids else None
    return check_answer(where, {"tokens": tokens, "reason": reason, "logprobs": values, "end": end}, limit, ends, vocabulary)


def _ids(where: str, choice: dict[str, Any], stop: Any, tokenizer: Any, ends: Ends) -> list[int]:
    text = choice.get("text")
    if not isinstance(text, str) or tokenizer is None:
        raise ValueError(
            f"{where}: the server gave neither ids nor a text that can be read. Use a server that gives token ids "
            "(`dialect: vllm`)."
        )
    say_once("The server gives no token ids. Its texts are tokenized here, perhaps into other tokens than the server drew.")
    if isinstance(stop, str) and ends.stop is not None and stop in ends.stop.texts and not text.endswith(stop):
        text += stop
    ids: list[int] = list(tokenizer.encode_batch([text])[0].ids)
    return ids
