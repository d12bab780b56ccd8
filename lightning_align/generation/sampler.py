"""The sampler: ragged prompts, one key-value cache, one column for all rows.

Prompts are padded on the left, so that every row writes the same column of the cache; relative positions make that
exact.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.distributed import everyone, is_sharded
from lightning_align.generation.filters import draw, filter_logits
from lightning_align.models.language_model import has_cache, logits_of

# Steps between two questions whether all rows are done: the answer costs a synchronisation with the device.
CHECK_EVERY = 8


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
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    num_samples: int = 1
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or null"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"generation: {name} is {getattr(self, name)}; it must be {expected}")


class Generation(NamedTuple):
    """One response."""

    tokens: list[int]
    """Without the end-of-sequence token."""
    finished: bool
    """Whether the model ended it; false if the limit cut it."""


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
    generator: torch.Generator | None = None,
) -> list[list[Generation]]:
    """Continue prompts of any lengths.

    Args:
        model: any language model; one with `make_cache` decodes in constant time a token.
        prompts: token ids, none of them empty.
        config: see `GenerationConfig`.
        eos_id: token that ends a response; None never ends one early.
        generator: source of random numbers; by default one seeded with `config.seed`.

    Returns:
        For each prompt its `num_samples` responses.

    Raises:
        ValueError: if a prompt is empty.
    """
    config = config or GenerationConfig()
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: a language model continues at least one token, such as BOS")
    device = next(model.parameters()).device
    if generator is None:
        generator = torch.Generator(device).manual_seed(config.seed)
    # Prompts of like length decode together: padding is decoded too.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[Generation]] = [[] for _ in prompts]
    with evaluating(model):
        for start in range(0, len(order), config.batch_size):
            chosen = order[start : start + config.batch_size]
            rows = [list(prompts[i]) for i in chosen for _ in range(config.num_samples)]
            decoded = _decode(model, rows, config, eos_id, generator, device)
            for place, i in enumerate(chosen):
                responses[i] = decoded[place * config.num_samples : (place + 1) * config.num_samples]
    return responses


def _decode(
    model: nn.Module,
    rows: list[list[int]],
    config: GenerationConfig,
    eos_id: int | None,
    generator: torch.Generator,
    device: torch.device,
) -> list[Generation]:
    steps = _cached_steps if has_cache(model) else _uncached_steps
    step = steps(model, rows, config, device)
    sharded = is_sharded(model)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    columns: list[Tensor] = []
    logits = next(step)
    for number in range(config.max_new_tokens):
        if config.temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            filters = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
            tokens = draw(filter_logits(logits, temperature=config.temperature, **filters), generator)  # type: ignore[arg-type]
        columns.append(tokens)
        if eos_id is not None:
            done |= tokens == eos_id
            if number % CHECK_EVERY == CHECK_EVERY - 1:
                finished = bool(done.all())
                if everyone(finished, device) if sharded else finished:
                    break
        if number + 1 < config.max_new_tokens:
            logits = step.send(tokens)
    return [_cut(row, eos_id) for row in torch.stack(columns, dim=1).tolist()]


def _cut(tokens: list[int], eos_id: int | None) -> Generation:
    if eos_id is None or eos_id not in tokens:
        return Generation(tokens, False)
    return Generation(tokens[: tokens.index(eos_id)], True)


def _cached_steps(
    model: Any, rows: list[list[int]], config: GenerationConfig, device: torch.device
) -> Any:  # a generator that yields logits (B, V) and is sent tokens (B,)
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    starts = (width - lengths)[:, None]
    limit = width + config.max_new_tokens
    columns = torch.arange(limit, device=device)
    exists, positions = columns >= starts, (columns - starts).clamp(min=0)
    cache = model.make_cache(len(rows), limit)
    ragged = int(lengths.min()) < width
    start, stop = 0, width
    while True:
        # Without padding there is nothing to mask but the future, which the cache's own layout does.
        mask = exists[:, :stop] if ragged else None
        hidden = model.hidden(tokens, mask=mask, positions=positions[:, start:stop], cache=cache)
        tokens = (yield F.linear(hidden[:, -1], *model.head))[:, None]
        start, stop = stop, stop + 1


def _uncached_steps(model: nn.Module, rows: list[list[int]], config: GenerationConfig, device: torch.device) -> Any:
    """The same for a module that only maps tokens to logits: rows stay on the left, each continues at its own place."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width + config.max_new_tokens, dtype=torch.long, device=device)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, device=device)
    places = torch.tensor([len(row) for row in rows], device=device)
    every = torch.arange(len(rows), device=device)
    while True:
        logits = logits_of(model, tokens[:, :width])
        tokens[every, places] = yield logits[every, places - 1]
        places, width = places + 1, width + 1
