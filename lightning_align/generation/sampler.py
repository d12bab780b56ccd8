"""The sampler: prompts of any lengths, continued together, each as if it were alone.

What is drawn for a response depends on the seed, the iteration, the number of its prompt and the position, and on nothing
that is computed beside it: the same tokens come out (to the rounding of the logits) for any batch size, order and number
of ranks.
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

# Steps between two looks at what was drawn: on a GPU a look waits for the device, on a CPU it costs next to nothing.
CHECK_EVERY, CHECK_EVERY_CPU = 8, 4
# Rows leave the batch once this share of it, or more, is done: leaving costs a copy of the cache.
LEAVE_AT = 0.25


@dataclass
class GenerationConfig:
    """How responses are sampled. Filters apply in the order temperature, top-k, top-p, min-p.

    Args:
        max_new_tokens: longest response, in tokens, its end-of-sequence token included.
        temperature: 0 takes the likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: keep the fewest likeliest tokens whose probabilities reach p.
        min_p: keep tokens at least this times as likely as the likeliest.
        num_samples: responses a prompt.
        batch_size: prompts decoded together.
        seed: of the random numbers.
        stop: texts that end a response; it keeps the token that completes one of them.
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
        """Check the values."""
        self.stop = list(self.stop)
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or null"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"generation: {name} is {getattr(self, name)}; it must be {expected}")


@dataclass
class Generation:
    """One response."""

    tokens: list[int]
    """Without the end-of-sequence token."""
    finished: bool
    """Whether the model ended it; false if a limit cut it."""
    logprobs: list[float] = field(default_factory=list, compare=False)
    """Of each token in nats, under the model without temperature and filters; one more if it ended with "eos"."""
    reason: FinishReason = field(default="length", compare=False)
    """What ended it: the end-of-sequence token, a stop text, or a limit."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode, then each submodule's own mode again (some are frozen in evaluation mode).

    `no_grad` and not inference mode: what an inference-mode pass leaves behind cannot take part in training.
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
    """Continue prompts of any lengths.

    Of a sharded model every rank must call this, with any number of prompts; ranks go on until all are done.

    Args:
        model: any language model; one with `make_cache` decodes in constant time a token.
        prompts: token ids, none of them empty.
        config: see `GenerationConfig`.
        eos_id: token that ends a response; None never ends one early.
        ids: numbers of the prompts, which choose their random numbers; by default their places.
        iteration: chooses other random numbers for the same prompts.
        limits: longest response of each prompt, where it is shorter than `max_new_tokens`.
        decode: text of token ids, which `stop` needs.

    Returns:
        For each prompt its `num_samples` responses.

    Raises:
        ValueError: if a prompt is empty or as long as the model's context, or `stop` is given without `decode`.
    """
    config = config or GenerationConfig()
    if config.stop and decode is None:
        raise ValueError(f"generation: stop is {list(config.stop)}, which needs a tokenizer: give `decode`, or leave it out")
    numbers = range(len(prompts)) if ids is None else ids
    most = _limits(model, prompts, numbers, config, limits)
    device = next(model.parameters()).device
    # Prompts of like length decode together: padding is decoded too.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    in_step = is_sharded(model)
    responses: list[list[Generation]] = [[] for _ in prompts]
    with evaluating(model), packed_linears(model):
        for number in range(largest(len(batches), device) if in_step else len(batches)):
            chosen = batches[number] if number < len(batches) else []
            rows = [
                _Row((config.seed, iteration, numbers[i], sample), most[i])
                for i in chosen
                for sample in range(config.num_samples)
            ]
            # A rank without work of its own keeps the others company.
            texts = [list(prompts[i]) for i in chosen] or [[0]]
            rows = rows or [_Row((0,), 0) for _ in range(config.num_samples)]
            _decode(model, texts, rows, config, eos_id, decode, device, in_step)
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
    """The longest response of each prompt."""
    context = context_length(model)
    most = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {numbers[index]} is empty: a language model continues at least one token, such as BOS")
        if context is not None and len(prompt) >= context:
            raise ValueError(
                f"prompt {numbers[index]} has {len(prompt)} tokens, and the model's context {context}, which leaves no room "
                "for a response: shorten it, or lower max_length so that such rows are dropped and counted"
            )
        limit = config.max_new_tokens if limits is None else min(config.max_new_tokens, limits[index])
        most.append(limit if context is None else min(limit, context - len(prompt)))
    return most


class _Row:
    """A response as it grows, on the host."""

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
    in_step: bool,
) -> None:
    """Fill the rows: so many of them a prompt as there are samples."""
    every = CHECK_EVERY if device.type == "cuda" or in_step else CHECK_EVERY_CPU
    limit = max(row.limit for row in rows)
    if in_step:
        limit = largest(limit, device)
    alive = rows
    sampled = config.temperature > 0
    noise = uniforms([row.key for row in rows], positions=limit if sampled else 0, draws=num_draws(config)).to(device)
    decoder = make_decoder(model, prompts, limit=limit, copies=len(rows) // len(prompts), device=device)
    logits = decoder.start(len(rows) // len(prompts))
    tokens: Tensor | None = None
    stops = _stopper(config.stop, decode)
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
        if everyone(not left, device) if in_step else not left:
            return
        if math.ceil(len(alive) * LEAVE_AT) <= len(alive) - len(left) and left:
            keep = torch.tensor(left, device=device)
            if decoder.select(keep):
                assert tokens is not None
                alive, tokens, noise = [alive[index] for index in left], tokens[keep], noise[keep]


def _stopper(stop: Sequence[str], decode: Callable[[list[int]], str] | None) -> Callable[[list[int]], bool] | None:
    """Whether a response ends in one of the texts, told from its last tokens: a token spells at least a byte."""
    if not stop or decode is None:
        return None
    window = max(len(text.encode()) for text in stop) + 1

    def stops(tokens: list[int]) -> bool:
        text = decode(tokens[-window:])
        return any(end in text for end in stop)

    return stops
