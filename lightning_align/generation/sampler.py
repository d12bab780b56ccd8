"""The sampler. It continues prompts of any lengths together, and each response is the same as if it were sampled alone.

The random numbers of a response depend only on the seed, the iteration, the prompt number, the sample number and the
position. The tokens are therefore the same for any batch size, order and number of ranks, up to the rounding of the logits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_align.generation.decoder import make_decoder
from lightning_align.generation.filters import choose, num_draws
from lightning_align.generation.noise import uniforms
from lightning_align.generation.packing import packed_linears
from lightning_align.models.language_model import context_length
from lightning_align.runtime.ranks import everyone, is_sharded, largest

FinishReason = Literal["eos", "stop", "length"]

# The number of steps between two checks for finished rows. A check waits for a GPU, but costs almost nothing on a CPU.
CHECK_EVERY, CHECK_EVERY_CPU = 8, 4
# Finished rows are removed once they make up this share of the batch. Each removal copies the cache.
LEAVE_AT = 0.25


@dataclass
class GenerationConfig:
    """The sampling settings. The filters apply in the order temperature, top-k, top-p, min-p.

    Args:
        max_new_tokens: The maximum length of a response in tokens, including its end-of-sequence token. Default is 128.
        temperature: The divisor of the logits. 0 takes the most likely token. Default is 1.
        top_k: Keep the k most likely tokens. Default is all.
        top_p: Keep the smallest set of most likely tokens that has a total probability of at least p. Default is 1 (all).
        min_p: Keep tokens that are at least this many times as likely as the most likely token. Default is 0 (all).
        num_samples: The number of responses per prompt. Default is 1.
        batch_size: The number of prompts that are decoded together. Default is 64.
        seed: The seed of the random numbers. Default is 0.
        stop: Texts that end a response. The response includes the token that completes the text. Default is none.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    num_samples: int = 1
    batch_size: int = 64
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a value is out of range.
        """
        self.stop = list(self.stop)
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1 or null"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "stop": (all(self.stop), "a list of texts that are not empty"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"`{name}` of GenerationConfig must be {expected}, but got {getattr(self, name)}.")


@dataclass
class Generation:
    """A response."""

    tokens: list[int]
    """The token ids, without the end-of-sequence token."""
    finished: bool
    """Whether the model ended the response. False if a length limit cut it."""
    logprobs: list[float] = field(default_factory=list, compare=False)
    """The log-prob of each token in nats, without temperature and filters. Includes the end-of-sequence token, if any."""
    reason: FinishReason = field(default="length", compare=False)
    """What ended the response: the end-of-sequence token, a stop text, or a length limit."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable gradients and set evaluation mode, then restore the mode of each submodule.

    Each submodule gets its own mode back, because some may be frozen in evaluation mode. The function uses `no_grad` and not
    inference mode, because tensors that a model keeps from inference mode cannot be used in training.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    eos_id: int | None = None,
    ids: Sequence[int] | None = None,
    iteration: int = 0,
    limits: Sequence[int] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> list[list[Generation]]:
    """Generate responses to prompts of any lengths.

    With a sharded model, every rank must call this function. Each rank may have any number of prompts. Ranks continue until
    all of them are done.

    Args:
        model: Any language model. A model without `make_cache` reads the whole prefix again for each token.
        prompts: The token ids of each prompt. No prompt may be empty.
        config: The sampling settings. Default is `GenerationConfig()`.
        eos_id: The id of the token that ends a response. With None, only limits and stop texts end a response.
        ids: The number of each prompt, which selects its random numbers. Default is its index in `prompts`.
        iteration: A number that selects other random numbers for the same prompts. Default is 0.
        limits: The maximum length of each response in tokens. It applies where it is below `max_new_tokens`.
        decode: A function from token ids to text. Required if `config.stop` is set.

    Returns:
        The `num_samples` responses to each prompt.

    Raises:
        ValueError: If a prompt is empty, if a prompt fills the context of the model, or if `stop` is set without `decode`.
    """
    config = config or GenerationConfig()
    if config.stop and decode is None:
        raise ValueError(f"`stop` is {list(config.stop)}, which needs a tokenizer. Pass `decode`, or remove `stop`.")
    numbers = range(len(prompts)) if ids is None else ids
    most = _limits(model, prompts, numbers, config, limits)
    device = next(model.parameters()).device
    # Prompts of similar length are decoded together, because padding costs time too.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    synchronized = is_sharded(model)
    responses: list[list[Generation]] = [[] for _ in prompts]
    with evaluating(model), packed_linears(model):
        for number in range(largest(len(batches), device) if synchronized else len(batches)):
            chosen = batches[number] if number < len(batches) else []
            rows = [
                _Row((config.seed, iteration, numbers[i], sample), most[i])
                for i in chosen
                for sample in range(config.num_samples)
            ]
            # A rank without prompts left decodes a dummy prompt, because forward passes of a sharded model are collectives.
            texts = [list(prompts[i]) for i in chosen] or [[0]]
            rows = rows or [_Row((0,), 0) for _ in range(config.num_samples)]
            _decode(model, texts, rows, config, eos_id, decode, device, synchronized)
            for place, i in enumerate(chosen):
                responses[i] = [row.result() for row in rows[place * config.num_samples : (place + 1) * config.num_samples]]
    return responses


def _limits(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    config: GenerationConfig,
    limits: Sequence[int] | None,
) -> list[int]:
    """Return the maximum response length of each prompt."""
    context = context_length(model)
    most = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Prompt {numbers[index]} is empty. A prompt needs at least one token, such as BOS.")
        if context is not None and len(prompt) >= context:
            raise ValueError(
                f"Prompt {numbers[index]} has {len(prompt)} tokens, but the context of the model has only {context}. There is "
                "no room for a response. Shorten the prompt, or lower `max_length`, which drops and counts such rows."
            )
        limit = config.max_new_tokens if limits is None else min(config.max_new_tokens, limits[index])
        most.append(limit if context is None else min(limit, context - len(prompt)))
    return most


class _Row:
    """The state of a growing response, on the host."""

    def __init__(self, key: tuple[int, ...], limit: int) -> None:
        self.key, self.limit = key, limit
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason: FinishReason | None = None if limit > 0 else "length"

    def extend(
        self, tokens: list[int], logprobs: list[float], eos_id: int | None, stops: Callable[[list[int]], bool] | None
    ) -> None:
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.reason is not None:
                return
            self.logprobs.append(logprob)
            if token == eos_id:
                self.reason = "eos"
                return
            self.tokens.append(token)
            if stops is not None and stops(self.tokens):
                self.reason = "stop"
            elif len(self.tokens) == self.limit:
                self.reason = "length"

    def result(self) -> Generation:
        assert self.reason is not None
        return Generation(self.tokens, self.reason != "length", self.logprobs, self.reason)


def _decode(
    model: nn.Module,
    prompts: list[list[int]],
    rows: list[_Row],
    config: GenerationConfig,
    eos_id: int | None,
    decode: Callable[[list[int]], str] | None,
    device: torch.device,
    synchronized: bool,
) -> None:
    """Decode one batch and fill its rows. Each prompt has `num_samples` consecutive rows."""
    every = CHECK_EVERY if device.type == "cuda" or synchronized else CHECK_EVERY_CPU
    limit = max(row.limit for row in rows)
    if synchronized:
        limit = largest(limit, device)
    alive = rows
    sampled = config.temperature > 0
    noise = uniforms([row.key for row in rows], positions=limit if sampled else 0, draws=num_draws(config)).to(device)
    decoder = make_decoder(model, prompts, limit=limit, copies=len(rows) // len(prompts), device=device)
    logits = decoder.start(len(rows) // len(prompts))
    tokens: Tensor | None = None
    stops = _make_stop_check(config.stop, decode)
    for start in range(0, limit, every):
        drawn, logprobs = [], []
        for position in range(start, min(start + every, limit)):
            if tokens is not None:
                logits = decoder.step(tokens)
            tokens, logps = choose(logits, noise[:, position] if sampled else noise[:, 0:0], config)
            drawn.append(tokens)
            logprobs.append(logps)
        columns = zip(torch.stack(drawn, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        for row, (new, values) in zip(alive, columns, strict=True):
            row.extend(new, values, eos_id, stops)
        left = [index for index, row in enumerate(alive) if row.reason is None]
        if everyone(not left, device) if synchronized else not left:
            return
        if math.ceil(len(alive) * LEAVE_AT) <= len(alive) - len(left) and left:
            keep = torch.tensor(left, device=device)
            if decoder.select(keep):
                assert tokens is not None
                alive, tokens, noise = [alive[index] for index in left], tokens[keep], noise[keep]


def _make_stop_check(stop: Sequence[str], decode: Callable[[list[int]], str] | None) -> Callable[[list[int]], bool] | None:
    """Build a function that returns whether a response ends with a stop text.

    The last tokens suffice for this check, because each token encodes at least one byte.
    """
    if not stop or decode is None:
        return None
    window = max(len(text.encode()) for text in stop) + 1

    def stops(tokens: list[int]) -> bool:
        text = decode(tokens[-window:])
        return any(end in text for end in stop)

    return stops
