"""The sampler. It continues prompts of any lengths together, and each response is the same as if it were sampled alone.

The random numbers of a response depend only on the seed, the iteration, the prompt number, the sample number and the
position. The tokens are therefore the same for any batch size, order and number of ranks, up to the rounding of the logits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_align.generation.decoder import make_decoder
from lightning_align.generation.ends import Ends, say_once
from lightning_align.generation.filters import choose, num_draws
from lightning_align.generation.history import History
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
    """The sampling settings.

    The filters apply in the order of transformers: repetition penalty, no-repeat n-grams, temperature, top-k, top-p, min-p,
    typical-p. At temperature 0, only the first two apply.

    Args:
        max_new_tokens: The maximum length of a response in tokens, including its end-of-sequence token. Default is 128.
        temperature: The divisor of the logits. 0 takes the most likely token. Default is 1.
        top_k: Keep the k most likely tokens. Default is all.
        top_p: Keep the smallest set of most likely tokens that has a total probability of at least p. Default is 1 (all).
        min_p: Keep tokens that are at least this many times as likely as the most likely token. Default is 0 (all).
        num_samples: The number of responses per prompt. Default is 1.
        batch_size: The number of prompts that are decoded together. Default is 64.
        seed: The seed of the random numbers. Default is 0.
        stop: Texts that end a response. The response includes the token that completes the text. Special tokens match by
            their text. Default is none.
        eos_token: Further tokens that end a response, as texts or ids. Default is only the end-of-sequence tokens of the
            tokenizer and those in the generation settings of the model.
        typical_p: Keep the tokens whose information is nearest to the entropy, up to a total probability of at least this
            (Meister et al. 2022, arXiv 2202.00666). Default is 1 (all).
        repetition_penalty: Divide the positive logits of the tokens in prompt and response by this, and multiply the negative
            ones (CTRL, Keskar et al. 2019, arXiv 1909.05858). Default is 1 (no penalty).
        no_repeat_ngram_size: Never repeat an n-gram of this many tokens of prompt and response (Paulus et al. 2017, arXiv
            1705.04304). Default is 0 (repeat any).
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
    eos_token: int | str | list[int | str] | None = None
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a value is out of range.
        """
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1 or null"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "stop": (all(self.stop), "a list of texts that are not empty"),
            "typical_p": (0 < self.typical_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "at least 0"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"`{name}` of GenerationConfig must be {expected}, but got {getattr(self, name)}.")

    def recorded(self) -> dict[str, Any]:
        """Return the settings for a record, which are compared when a run resumes.

        Settings that version 0.1.0 did not have are left out at their default, so that its records stay equal.
        """
        later = {"eos_token": None, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


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
    """What ended the response: an end-of-sequence token, a stop text, or a length limit."""
    end: int | None = field(default=None, compare=False)
    """The id of the end-of-sequence token that ended the response. None if none did."""
    unsupported: int = field(default=0, compare=False)
    """The number of ids that do not exist, from which on an answer of another engine was cut."""


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
    ends: Ends | None = None,
    eos_id: int | Sequence[int] | None = None,
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
        ends: How responses end, and which ids exist. See `Ends.of`.
        eos_id: Without `ends`: the ids of the tokens that end a response. The ids that the model declares end it too. With
            None, only limits and stop texts end a response.
        ids: The number of each prompt, which selects its random numbers. Default is its index in `prompts`.
        iteration: A number that selects other random numbers for the same prompts. Default is 0.
        limits: The maximum length of each response in tokens. It applies where it is below `max_new_tokens`.
        decode: Without `ends`: a function from token ids to text. Required if `config.stop` is set.

    Returns:
        The `num_samples` responses to each prompt.

    Raises:
        ValueError: If a prompt is empty, if a prompt fills the context of the model, if `stop` is set without `decode`, or
            if the model gives logits from which no token can be chosen.
    """
    config = config or GenerationConfig()
    if ends is None:
        ends = Ends.exactly(eos_id, config=config, model=model, decode=decode)
    elif config.stop and ends.stop is None:
        raise ValueError(
            f"`stop` of `config` is {list(config.stop)}, but `ends` has no stop texts. Build it with "
            "`Ends.of(config=config, ...)`."
        )
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
            rows = rows or [_Row((0, 0, 0, 0), 0) for _ in range(config.num_samples)]
            _decode(model, texts, rows, config, ends, device, synchronized)
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
        self.end: int | None = None

    def extend(self, tokens: list[int], logprobs: list[float], ends: Ends) -> None:
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

    def result(self) -> Generation:
        assert self.reason is not None
        return Generation(self.tokens, self.reason != "length", self.logprobs, self.reason, self.end)


def _decode(
    model: nn.Module,
    prompts: list[list[int]],
    rows: list[_Row],
    config: GenerationConfig,
    ends: Ends,
    device: torch.device,
    synchronized: bool,
) -> None:
    """Decode one batch and fill its rows. Each prompt has `num_samples` consecutive rows."""
    every = CHECK_EVERY if device.type == "cuda" or synchronized else CHECK_EVERY_CPU
    limit = max(row.limit for row in rows)
    if synchronized:
        limit = largest(limit, device)
    alive = rows
    sampled, copies = config.temperature > 0, len(rows) // len(prompts)
    noise = uniforms([row.key for row in rows], positions=limit if sampled else 0, draws=num_draws(config)).to(device)
    decoder = make_decoder(model, prompts, limit=limit, copies=copies, device=device)
    logits = decoder.start(copies)
    history = History(prompts, room=limit, copies=copies, device=device, settings=config)
    absent = ends.support.absent(logits.shape[-1], device)
    if absent is not None:
        number = ends.support.num_absent(len(absent))
        say_once(f"{number} of the {len(absent)} ids of the model stand for no token of the tokenizer. They are never drawn.")
    tokens: Tensor | None = None
    for start in range(0, limit, every):
        drawn, logprobs = [], []
        for position in range(start, min(start + every, limit)):
            if tokens is not None:
                logits = decoder.step(tokens)
            allowed = history.filtered(logits)
            if absent is not None:
                allowed = allowed.masked_fill(absent, -torch.inf)
            tokens, logps = choose(logits, noise[:, position] if sampled else noise[:, 0:0], config, allowed=allowed)
            history.append(tokens)
            drawn.append(tokens)
            logprobs.append(logps)
        columns = zip(torch.stack(drawn, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        for row, (new, values) in zip(alive, columns, strict=True):
            row.extend(new, values, ends)
        left = [index for index, row in enumerate(alive) if row.reason is None]
        if everyone(not left, device) if synchronized else not left:
            return
        if math.ceil(len(alive) * LEAVE_AT) <= len(alive) - len(left) and left:
            keep = torch.tensor(left, device=device)
            if decoder.select(keep):
                assert tokens is not None
                alive, tokens, noise = [alive[index] for index in left], tokens[keep], noise[keep]
                history.select(keep)
