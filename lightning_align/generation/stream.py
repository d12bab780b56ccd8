"""A response as it is written, piece by piece."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lightning_align.generation.decoding import Prompt, Row, decode_prompts
from lightning_align.generation.ends import Ends
from lightning_align.generation.packing import packed_linears
from lightning_align.generation.sampler import GenerationConfig, evaluating
from lightning_align.models.language_model import context_length

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for the first bytes of a character."""
_END = object()


def stream(
    model: nn.Module, prompt: Sequence[int], config: GenerationConfig, *, tokenizer: Any, number: int = 0
) -> Iterator[str]:
    """Continue a prompt and yield the text of the response in pieces, which together are the whole response.

    The response is the same as that of `generate` with the same settings and number.

    Args:
        model: Any language model.
        prompt: The token ids of the prompt.
        config: The sampling settings. One response is generated.
        tokenizer: The tokenizer of the model.
        number: The number of the prompt, which selects its random numbers.

    Yields:
        Pieces of text. A character is yielded when all of its bytes are there.

    Raises:
        ValueError: If the prompt is empty or fills the context of the model.
    """
    context = context_length(model)
    if not prompt or (context is not None and len(prompt) >= context):
        raise ValueError(f"The prompt must have 1 to {(context or 0) - 1} tokens, but has {len(prompt)}. Shorten it.")
    limit = config.max_new_tokens if context is None else min(config.max_new_tokens, context - len(prompt))
    row = Row((config.seed, 0, number, 0), limit)
    ends = Ends.of(tokenizer=tokenizer, model=model, config=config)
    steps = decode_prompts(model, deque([Prompt(list(prompt), [row])]), config, ends, continuous=False)
    written, ended, int8 = "", False, config.int8_weights(model)
    while not ended:
        # Not around the loop: the modes of the model and of autograd would stay changed in the code that takes the pieces, and
        # an iterator that is left early would change them back whenever it is collected.
        with evaluating(model), packed_linears(model, int8):
            ended = next(steps, _END) is _END
        text = tokenizer.decode(row.tokens)
        if row.reason is None:
            text = text.rstrip(_INCOMPLETE)
        if len(text) > len(written) and text.startswith(written):
            yield text[len(written) :]
            written = text
