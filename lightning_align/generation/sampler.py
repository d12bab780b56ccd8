"""The sampler. It continues prompts of any lengths together, and each response is the same as if it were sampled alone.

The random numbers of a response depend only on the seed, the iteration, the prompt number, the sample number and the
position. The tokens are therefore the same for any batch size, order and number of ranks, up to the rounding of the logits.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lightning_align.generation.casting import casts_kept
from lightning_align.generation.decoding import FinishReason as FinishReason
from lightning_align.generation.decoding import Prompt, Row, decode_prompts
from lightning_align.generation.ends import Ends
from lightning_align.generation.filter_function import import_path
from lightning_align.generation.int8 import Int8Weights
from lightning_align.generation.int8 import check as check_int8
from lightning_align.generation.packing import packed_linears
from lightning_align.models.gathered import gathered
from lightning_align.models.language_model import context_length
from lightning_align.runtime import modes
from lightning_align.runtime.kinds import check_kinds, hints_of
from lightning_align.runtime.ranks import is_sharded


@dataclass
class GenerationConfig:
    """The sampling settings.

    The filters apply in the order of transformers: repetition penalty, no-repeat n-grams, temperature, top-k, top-p, min-p,
    typical-p. At temperature 0, only the first two apply. A `filter_fn` applies between the first two and temperature.

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
        filter_fn: A filter of your own, as a function or by its import path, such as `my_package.keep_digits`. It gets the
            logits (B, V) and returns them with -inf at removed tokens. Default is none.
        filter_kwargs: Further arguments of `filter_fn`. Default is none.
        prompt_lookup: The number of tokens to guess where the response repeats what is in the prompt or in itself. They are
            read in one pass, and the response is that without guesses, up to the rounding of the logits. It holds for one row
            at a time on a CPU (`batch_size: 1`, `chat`), where it pays if much is repeated. Default is 0 (none).
        quantization: `int8` generates with the weights of linear layers in 8 bits, on a CPU. Responses come sooner, and from a
            model that differs a little. The log-probs of a `Generation` are those of that model. Default is none.
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
    filter_fn: str | Callable[..., Tensor] | None = None
    filter_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_lookup: int = 0
    quantization: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a value is out of range.
        """
        # What a filter must be is said by `import_path`.
        check_kinds("GenerationConfig", hints_of(type(self)), {**vars(self), "filter_fn": None})
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
            "prompt_lookup": (self.prompt_lookup >= 0, "at least 0"),
            "quantization": (self.quantization in (None, "int8"), "int8 or null"),
            "filter_kwargs": (self.filter_fn is not None or not self.filter_kwargs, "empty without `filter_fn`"),
        }
        if self.filter_fn is not None:
            self.filter_fn = import_path(self.filter_fn)
        for name, (right, expected) in checks.items():
            if not right:
                raise ValueError(f"`{name}` of GenerationConfig must be {expected}, but got {getattr(self, name)}.")

    def int8_weights(self, model: nn.Module) -> Int8Weights | None:
        """Return where weights of 8 bits are kept, with ``quantization: int8``.

        Raises:
            ValueError: If the model cannot generate with them.
        """
        if self.quantization is None:
            return None
        check_int8(next(model.parameters()).device, sharded=is_sharded(model))
        return Int8Weights()

    def recorded(self) -> dict[str, Any]:
        """Return the settings for a record, which are compared when a run resumes.

        Settings that version 0.1.0 did not have are left out at their default, so that its records stay equal.
        """
        later: dict[str, Any] = {"eos_token": None, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        later |= {"filter_fn": None, "filter_kwargs": {}, "prompt_lookup": 0, "quantization": None}
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
    """Evaluate a model within a ``with`` block, as `lightning_align.runtime.modes.evaluating` does, for several passes.

    Mixed precision casts the weights once, see `casts_kept`.
    """
    with modes.evaluating(model), casts_kept(model):
        yield


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
    continuous: bool = True,
) -> list[list[Generation]]:
    """Generate responses to prompts of any lengths.

    The tokens that all prompts begin with, such as a system message, are read once if the cache of the model allows it.

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
        continuous: Whether the next prompt starts as soon as a row has ended. If false, and for models whose cache or sharding
            does not allow it, the next prompts start when a whole batch has ended. The responses are the same. Default is
            true.

    Returns:
        The `num_samples` responses to each prompt.

    Raises:
        ValueError: If a prompt is empty, if a prompt fills the context of the model, if `stop` is set without `decode`, or
            if the model gives logits from which no token can be chosen.
    """
    # Prompts of similar length are decoded together, because padding costs time too.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = generate_parts(
        model,
        prompts,
        config,
        parts=[order],
        ends=ends,
        eos_id=eos_id,
        ids=ids,
        iteration=iteration,
        limits=limits,
        decode=decode,
        continuous=continuous,
    )
    ((_, answers),) = parts
    responses: list[list[Generation]] = [[] for _ in prompts]
    for index, own in zip(order, answers, strict=True):
        responses[index] = own
    return responses


def generate_parts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    parts: Sequence[Sequence[int]],
    ends: Ends | None = None,
    eos_id: int | Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    iteration: int = 0,
    limits: Sequence[int] | None = None,
    decode: Callable[[list[int]], str] | None = None,
    continuous: bool = True,
) -> Iterator[tuple[int, list[list[Generation]]]]:
    """Generate responses and yield them in parts, each as soon as it is complete.

    The rows of the next parts already grow when a part is yielded. The model may be used between two parts, but its weights
    must not change.

    With a sharded model, every rank must pass the same number of parts. A part is then generated only after the previous one.

    Args:
        model: Any language model.
        prompts: The token ids of each prompt.
        config: The sampling settings.
        parts: For each part, the indices of its prompts. Prompts are started in this order.
        ends: See `generate`.
        eos_id: See `generate`.
        ids: See `generate`.
        iteration: See `generate`.
        limits: See `generate`.
        decode: See `generate`.
        continuous: See `generate`.

    Yields:
        The number of a part, and the `num_samples` responses to each of its prompts.

    Raises:
        ValueError: See `generate`.
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
    synchronized = is_sharded(model)
    int8 = config.int8_weights(model)
    started = [
        [
            Prompt(list(prompts[i]), [Row((config.seed, iteration, numbers[i], k), most[i]) for k in range(config.num_samples)])
            for i in part
        ]
        for part in parts
    ]
    # Forward passes of a sharded model are collectives, so that ranks cannot start prompts at different times.
    groups = [[number] for number in range(len(parts))] if synchronized or not continuous else [list(range(len(parts)))]
    for group in groups:
        waiting = deque(prompt for number in group for prompt in started[number])
        steps = decode_prompts(model, waiting, config, ends, continuous=continuous and not synchronized)
        completed = _completed(model, steps, {number: started[number] for number in group}, int8)
        if not synchronized:
            yield from completed
            continue
        with gathered(model):
            answers = list(completed)
        yield from answers


def _completed(
    model: nn.Module, steps: Iterator[None], parts: dict[int, list[Prompt]], int8: Int8Weights | None
) -> Iterator[tuple[int, list[list[Generation]]]]:
    """Decode, and yield each part that is complete. Outside of this, the model has its own mode and layers."""
    more = True
    while more or parts:
        with evaluating(model), packed_linears(model, int8):
            complete: list[int] = []
            while more and not complete:
                more = next(steps, steps) is not steps
                complete = [number for number, prompts in parts.items() if all(prompt.ended for prompt in prompts)]
        for number in complete or list(parts):
            yield number, [[_result(row) for row in prompt.rows] for prompt in parts.pop(number)]


def _result(row: Row) -> Generation:
    assert row.reason is not None
    return Generation(row.tokens, row.reason != "length", row.logprobs, row.reason, row.end)


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
