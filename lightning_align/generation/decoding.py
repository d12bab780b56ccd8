"""The decoding loop. It draws the tokens of a batch of rows, removes rows that ended, and starts the next prompts."""

import math
from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.generation.decoder import make_decoder
from lightning_align.generation.ends import Ends, say_once
from lightning_align.generation.filter_function import FilterSettings, filtered_by_function
from lightning_align.generation.filters import Filters, choose, num_draws
from lightning_align.generation.history import History, Repetition
from lightning_align.generation.looks import Looks
from lightning_align.generation.lookup import PromptLookup
from lightning_align.generation.noise import uniforms
from lightning_align.generation.prefix import Prefix, read_prefix
from lightning_align.runtime.ranks import everyone, is_sharded, largest
from lightning_align.runtime.transfer import to_device

FinishReason = Literal["eos", "stop", "length"]

# The number of steps between two checks for finished rows. A check waits for a GPU, but costs almost nothing on a CPU.
CHECK_EVERY, CHECK_EVERY_CPU = 8, 4
# Finished rows are removed once they make up this share of the batch. Each removal copies the cache.
LEAVE_AT = 0.25
# The next prompts start once this share of the batch is free. Each start copies the cache, and reads the new prompts together.
JOIN_AT = 0.125


class Settings(Filters, Repetition, FilterSettings, Protocol):
    """The sampling settings that the loop reads. `GenerationConfig` has them."""

    num_samples: int
    batch_size: int
    prompt_lookup: int


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
        self.end: int | None = None

    def extend(self, tokens: list[int], logprobs: list[float], ends: Ends) -> None:
        """Append tokens until the response ends.

        Raises:
            ValueError: If a log-prob is not finite, which means that no token could be chosen.
        """
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.reason is not None:
                return
            if not math.isfinite(logprob):
                raise ValueError(self._no_choice())
            self.logprobs.append(logprob)
            if token in ends.ids:
                self.reason, self.end = "eos", token
                return
            self.tokens.append(token)
            if ends.stop is not None and ends.stop.reached(self.tokens):
                self.reason = "stop"
            elif len(self.tokens) == self.limit:
                self.reason = "length"

    def _no_choice(self) -> str:
        _, _, prompt, sample = self.key
        return (
            f"No token can be chosen at step {len(self.tokens)} of the response to prompt {prompt} (sample {sample}): the "
            "logits are NaN or infinite, or every token is excluded. Check the weights and the dtype of the model, and "
            "`no_repeat_ngram_size`."
        )


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
    ends: Ends,
    *,
    continuous: bool,
) -> Iterator[None]:
    """Decode all prompts, and yield whenever rows may have ended.

    At most `batch_size` prompts are decoded together. If `continuous`, and if the decoder supports it, the next prompts start
    when rows have ended. Otherwise they start when all rows have ended.

    With a sharded model, every rank must call this. Each rank may have any number of prompts.
    """
    device, synchronized = next(model.parameters()).device, is_sharded(model)
    every = CHECK_EVERY if device.type != "cpu" or synchronized else CHECK_EVERY_CPU
    most = -(-len(waiting) // config.batch_size)
    prefix = None if synchronized else read_prefix(model, [prompt.tokens for prompt in waiting], device)
    for _ in range(largest(most, device) if synchronized else most):
        if not waiting and not synchronized:
            return
        # A rank without prompts left decodes a dummy prompt, because forward passes of a sharded model are collectives.
        prompts = _take(waiting, config.batch_size) or [Prompt([0], [Row((0, 0, 0, 0), 0) for _ in range(config.num_samples)])]
        batch = _Batch(model, prompts, config, ends, device, prefix)
        while True:
            left = [index for index, row in enumerate(batch.rows) if row.reason is None]
            if everyone(not left, device) if synchronized else not left:
                break
            ended = len(batch.rows) - len(left)
            free = config.batch_size - math.ceil(len(left) / config.num_samples)
            room = ended and waiting and free >= math.ceil(config.batch_size * JOIN_AT)
            if room and continuous and batch.tokens is not None and batch.decoder.joins:
                batch.keep(left)
                batch.join(_take(waiting, free))
            else:
                if left and batch.tokens is not None and ended >= math.ceil(len(batch.rows) * LEAVE_AT):
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
        ends: Ends,
        device: torch.device,
        prefix: Prefix | None,
    ) -> None:
        self.config, self.ends, self.device = config, ends, device
        self.rows = [row for prompt in prompts for row in prompt.rows]
        self.prompts = [prompt.tokens for prompt in prompts for _ in prompt.rows]
        self.lookup: tuple[Row, PromptLookup] | None = None
        self.limit = max(row.limit for row in self.rows)
        if is_sharded(model):
            self.limit = largest(self.limit, device)
        texts, copies = [prompt.tokens for prompt in prompts], config.num_samples
        self.noise = self._noise(self.rows, self.limit)
        self.decoder = make_decoder(model, texts, limit=self.limit, copies=copies, device=device, prefix=prefix)
        self.logits: Tensor = self.decoder.start(copies)
        self.history = History(texts, room=self.limit, copies=copies, device=self.device, settings=self.config)
        self.absent = self.ends.support.absent(self.logits.shape[-1], self.device)
        if self.absent is not None:
            say_once(
                f"{self.ends.support.num_absent(len(self.absent))} of the {len(self.absent)} ids of the model stand for no "
                "token of the tokenizer. They are never drawn."
            )
        self.tokens: Tensor | None = None
        # The ranks of a sharded model agree on each look, and wait for each other anyway.
        self.looks = Looks[Row](device, late=not is_sharded(model))

    def advance(self, steps: int) -> None:
        """Draw up to `steps` tokens per row. On a GPU the rows get them one look later, and all with the last look."""
        drawn, logprobs = [], []
        steps, guesses = min(steps, self.limit), self._guesses()
        if guesses is not None:
            steps = min(1 + len(guesses), self.limit)
        if guesses:
            assert self.tokens is not None
            ahead = self.decoder.ahead(torch.cat((self.tokens, to_device(guesses, self.device))))
        for step in range(steps):
            if guesses:
                self.logits = ahead[step : step + 1]
            elif self.tokens is not None:
                self.logits = self.decoder.step(self.tokens)
            self.tokens, logps = self._choose(self.logits, self.noise[:, step], self.history)
            drawn.append(self.tokens)
            logprobs.append(logps)
            if guesses and (step == len(guesses) or int(self.tokens) != guesses[step]):
                self.decoder.rewind(steps - step - 1)
                steps = step + 1
                break
        self.noise, self.limit = self.noise[:, steps:], self.limit - steps
        self.looks.add(self.rows, torch.stack(drawn, 1), torch.stack(logprobs, 1))
        # Behind the last look nothing is left to start.
        self.read(1 if self.limit else 0)

    def _guesses(self) -> list[int] | None:
        """Return guesses at the next tokens of the only row, or None if there is no lookup."""
        if not self.config.prompt_lookup or len(self.rows) > 1 or self.tokens is None or not self.decoder.rewinds:
            return None
        (row,), (prompt,) = self.rows, self.prompts
        if self.lookup is None or self.lookup[0] is not row:
            self.lookup = row, PromptLookup(prompt)
        lookup = self.lookup[1]
        lookup.extend(row.tokens[len(lookup.tokens) - len(prompt) :])
        return lookup.guess(max(0, min(self.config.prompt_lookup, self.limit - 1)))

    def read(self, late: int) -> None:
        """Give the rows their tokens, except for those of the last `late` looks."""
        for rows, tokens, logprobs in self.looks.read(late):
            for row, new, values in zip(rows, tokens, logprobs, strict=True):
                row.extend(new, values, self.ends)

    def keep(self, rows: list[int]) -> None:
        """Drop the other rows, if the decoder can."""
        if len(rows) == len(self.rows):
            return
        keep = to_device(rows, self.device)
        if self.decoder.select(rows):
            assert self.tokens is not None
            self.rows, self.tokens, self.noise = [self.rows[row] for row in rows], self.tokens[keep], self.noise[keep]
            self.prompts = [self.prompts[row] for row in rows]
            self.history.select(keep)

    def join(self, prompts: list[Prompt]) -> None:
        """Read more prompts, draw the first token of their rows, and append these rows."""
        new = [row for prompt in prompts for row in prompt.rows]
        self.limit = max(*(row.limit - len(row.tokens) for row in self.rows), *(row.limit - 1 for row in new))
        texts, copies = [prompt.tokens for prompt in prompts], self.config.num_samples
        logits = self.decoder.join(texts, limit=self.limit, copies=copies)
        noise = self._noise(new, self.limit + 1)
        history = History(texts, room=self.limit + 1, copies=copies, device=self.device, settings=self.config)
        tokens, logps = self._choose(logits, noise[:, 0], history)
        self.looks.add(new, tokens[:, None], logps[:, None])
        assert self.tokens is not None
        self.history.join(history, room=self.limit)
        self.tokens = torch.cat((self.tokens, tokens))
        own = F.pad(self.noise, (0, 0, 0, self.limit - self.noise.shape[1]))
        self.prompts += [prompt.tokens for prompt in prompts for _ in prompt.rows]
        self.rows, self.noise = self.rows + new, torch.cat((own, noise[:, 1:]))

    def _choose(self, logits: Tensor, noise: Tensor, history: History) -> tuple[Tensor, Tensor]:
        allowed = filtered_by_function(history.filtered(logits), self.config)
        if self.absent is not None:
            allowed = allowed.masked_fill(self.absent, -torch.inf)
        tokens, logps = choose(logits, noise, self.config, allowed=allowed)
        history.append(tokens)
        return tokens, logps

    def _noise(self, rows: list[Row], positions: int) -> Tensor:
        draws = num_draws(self.config) if self.config.temperature > 0 else 0
        return uniforms([row.key for row in rows], positions=positions, draws=draws).to(self.device, non_blocking=True)
