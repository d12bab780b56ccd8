"""The decoding loop. It draws the tokens of a batch of rows, removes rows that ended, and starts the next prompts."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.generation.decoder import make_decoder
from lightning_align.generation.filters import Filters, choose, num_draws
from lightning_align.generation.noise import uniforms
from lightning_align.runtime.ranks import everyone, is_sharded, largest

FinishReason = Literal["eos", "stop", "length"]

# The number of steps between two checks for finished rows. A check waits for a GPU, but costs almost nothing on a CPU.
CHECK_EVERY, CHECK_EVERY_CPU = 8, 4
# Finished rows are removed once they make up this share of the batch. Each removal copies the cache.
LEAVE_AT = 0.25
# The next prompts start once this share of the batch is free. Each start copies the cache, and reads the new prompts together.
JOIN_AT = 0.125


class Settings(Filters, Protocol):
    """The sampling settings that the loop reads. `GenerationConfig` has them."""

    num_samples: int
    batch_size: int
    stop: Sequence[str]


class Row:
    """The state of a growing response, on the host.

    Args:
        key: The key of its random numbers: the seed, the iteration, and the numbers of prompt and sample.
        limit: The maximum number of tokens.
    """

    def __init__(self, key: tuple[int, ...], limit: int) -> None:
        self.key, self.limit = key, limit
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason: FinishReason | None = None if limit > 0 else "length"

    def extend(
        self, tokens: list[int], logprobs: list[float], eos_id: int | None, stops: Callable[[list[int]], bool] | None
    ) -> None:
        """Append tokens until the response ends."""
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


class Prompt(NamedTuple):
    """A prompt and the rows of its samples."""

    tokens: list[int]
    rows: list[Row]

    @property
    def ended(self) -> bool:
        """Whether all samples have ended."""
        return all(row.reason is not None for row in self.rows)


def decode_prompts(
    model: nn.Module,
    waiting: deque[Prompt],
    config: Settings,
    eos_id: int | None,
    decode: Callable[[list[int]], str] | None,
    *,
    continuous: bool,
) -> Iterator[None]:
    """Decode all prompts, and yield whenever rows may have ended.

    At most `batch_size` prompts are decoded together. If `continuous`, and if the decoder supports it, the next prompts start
    when rows have ended. Otherwise they start when all rows have ended.

    With a sharded model, every rank must call this. Each rank may have any number of prompts.
    """
    device, synchronized = next(model.parameters()).device, is_sharded(model)
    stops = _make_stop_check(config.stop, decode)
    every = CHECK_EVERY if device.type == "cuda" or synchronized else CHECK_EVERY_CPU
    most = -(-len(waiting) // config.batch_size)
    for _ in range(largest(most, device) if synchronized else most):
        if not waiting and not synchronized:
            return
        # A rank without prompts left decodes a dummy prompt, because forward passes of a sharded model are collectives.
        prompts = _take(waiting, config.batch_size) or [Prompt([0], [Row((0,), 0) for _ in range(config.num_samples)])]
        batch = _Batch(model, prompts, config, eos_id, stops, device)
        if synchronized:
            batch.limit = largest(batch.limit, device)
        batch.start()
        while True:
            left = [index for index, row in enumerate(batch.rows) if row.reason is None]
            if everyone(not left, device) if synchronized else not left:
                break
            free = config.batch_size - math.ceil(len(left) / config.num_samples)
            if continuous and waiting and free >= math.ceil(config.batch_size * JOIN_AT) and batch.decoder.joins:
                batch.keep(left)
                batch.join(_take(waiting, free))
            else:
                if left and len(batch.rows) - len(left) >= math.ceil(len(batch.rows) * LEAVE_AT):
                    batch.keep(left)
                batch.advance(every)
            yield


def _take(waiting: deque[Prompt], count: int) -> list[Prompt]:
    return [waiting.popleft() for _ in range(min(count, len(waiting)))]


class _Batch:
    """The rows that are decoded together.

    After each step, the last token of each row is drawn, but the decoder has not read it. `limit` is the number of tokens that
    any row may still draw, and `noise` (B, `limit`, draws) has their random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: list[Prompt],
        config: Settings,
        eos_id: int | None,
        stops: Callable[[list[int]], bool] | None,
        device: torch.device,
    ) -> None:
        self.model, self.prompts, self.config, self.device = model, prompts, config, device
        self.eos_id, self.stops = eos_id, stops
        self.rows = [row for prompt in prompts for row in prompt.rows]
        self.limit = max(row.limit for row in self.rows)

    def start(self) -> None:
        """Read the prompts."""
        prompts, copies = [prompt.tokens for prompt in self.prompts], self.config.num_samples
        self.noise = self._noise(self.rows, self.limit)
        self.decoder = make_decoder(self.model, prompts, limit=self.limit, copies=copies, device=self.device)
        self.logits: Tensor = self.decoder.start(copies)
        self.tokens: Tensor | None = None

    def advance(self, steps: int) -> None:
        """Draw up to `steps` tokens per row."""
        drawn, logprobs = [], []
        steps = min(steps, self.limit)
        for step in range(steps):
            if self.tokens is not None:
                self.logits = self.decoder.step(self.tokens)
            self.tokens, logps = choose(self.logits, self.noise[:, step], self.config)
            drawn.append(self.tokens)
            logprobs.append(logps)
        self.noise, self.limit = self.noise[:, steps:], self.limit - steps
        self._extend(self.rows, torch.stack(drawn, 1), torch.stack(logprobs, 1))

    def keep(self, rows: list[int]) -> None:
        """Drop the other rows, if the decoder can."""
        if len(rows) == len(self.rows):
            return
        keep = torch.tensor(rows, device=self.device)
        if self.decoder.select(keep):
            assert self.tokens is not None
            self.rows, self.tokens, self.noise = [self.rows[row] for row in rows], self.tokens[keep], self.noise[keep]

    def join(self, prompts: list[Prompt]) -> None:
        """Read more prompts, draw the first token of their rows, and append these rows."""
        new = [row for prompt in prompts for row in prompt.rows]
        self.limit = max(*(row.limit - len(row.tokens) for row in self.rows), *(row.limit - 1 for row in new))
        logits = self.decoder.join([p.tokens for p in prompts], limit=self.limit, copies=self.config.num_samples)
        noise = self._noise(new, self.limit + 1)
        tokens, logps = choose(logits, noise[:, 0], self.config)
        self._extend(new, tokens[:, None], logps[:, None])
        assert self.tokens is not None
        self.tokens = torch.cat((self.tokens, tokens))
        own = F.pad(self.noise, (0, 0, 0, self.limit - self.noise.shape[1]))
        self.rows, self.noise = self.rows + new, torch.cat((own, noise[:, 1:]))

    def _extend(self, rows: list[Row], tokens: Tensor, logprobs: Tensor) -> None:
        for row, new, values in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.extend(new, values, self.eos_id, self.stops)

    def _noise(self, rows: list[Row], positions: int) -> Tensor:
        draws = num_draws(self.config) if self.config.temperature > 0 else 0
        return uniforms([row.key for row in rows], positions=positions, draws=draws).to(self.device)


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
