"""The Llamas and the preference pairs of the scripts in `benchmarks/gpu`, and the work that a step on them takes at least."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common.pairs import EOS, Pair
from lightning_align.types import TokenBatch

VOCABULARY = 128_256
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "0.5B": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    # The shape of Llama 3.2 1B.
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def configuration(size: str, vocabulary: int, **more: Any) -> dict[str, Any]:
    """The configuration of a Llama, for transformers."""
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        **SIZES[size],
        **more,
    }


def pairs(count: int, vocabulary: int, *, longest: int, seed: int = 0) -> list[Pair]:
    """Random pairs with the lengths of chats: log-normal, prompts around 150 tokens and responses around 300.

    Args:
        count: The number of pairs.
        vocabulary: Its size; ids are uniform.
        longest: The largest number of tokens of a row. Lengths are in proportion to it; the numbers above are for 2048.
        seed: Seed of the lengths and ids.
    """
    draw = np.random.default_rng(seed)
    scale = longest / 2048

    def ids(middle: float, spread: float, low: int, high: int) -> list[int]:
        length = int(np.clip(draw.lognormal(np.log(middle * scale), spread), max(2, low * scale), high * scale))
        return draw.integers(2, vocabulary, length).tolist()  # type: ignore[no-any-return]

    def response() -> list[int]:
        return [*ids(300, 0.6, 20, 1000)[:-1], EOS]

    return [Pair(ids(150, 0.7, 10, 1000), response(), response()) for _ in range(count)]


class Work(NamedTuple):
    """What a step has to do at least, whatever its padding."""

    tokens: int
    """Tokens of all rows, without padding."""
    targets: int
    """Tokens of all responses."""
    flops: float
    """Operations of forward and backward pass of the policy, and of the forward pass of the reference."""


def work(batch: Sequence[Pair], size: str, vocabulary: int, *, reference: bool = True) -> Work:
    """Count the work of a DPO step.

    A weight of a layer costs 2 operations per token forward and 4 backward, one of the output layer per target alone. Causal
    attention over n tokens costs 2 n² per width of the heads forward, twice that backward.

    Args:
        batch: The pairs of the step.
        size: Name of the model.
        vocabulary: Its vocabulary.
        reference: Whether the reference scores the rows in the step.
    """
    sizes = SIZES[size]
    dim, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    head = dim // sizes["num_attention_heads"]
    projections = dim * head * (2 * sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"])
    weights = layers * (projections + 3 * dim * sizes["intermediate_size"])
    rows = [len(pair.prompt) + len(response) for pair in batch for response in (pair.chosen, pair.rejected)]
    targets = sum(len(response) for pair in batch for response in (pair.chosen, pair.rejected))
    forward = 2.0 * weights * sum(rows) + 2.0 * layers * dim * sum(n * n for n in rows) + 2.0 * vocabulary * dim * targets
    return Work(sum(rows), targets, forward * (4 if reference else 3))


def packed(batch: Sequence[Pair], capacity: int) -> TokenBatch:
    """All rows of a batch in sequences without padding between them: chosen rows first, in order, as `concatenate` has them."""
    rows = [(pair.prompt, pair.chosen) for pair in batch] + [(pair.prompt, pair.rejected) for pair in batch]
    sequences: list[list[tuple[int, list[int], list[int]]]] = [[]]
    used = 0
    for number, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        if used + length > capacity and sequences[-1]:
            sequences.append([])
            used = 0
        sequences[-1].append((number, prompt, response))
        used += length
    width = max(sum(len(p) + len(r) for _, p, r in sequence) for sequence in sequences)
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    documents = torch.full_like(tokens, -1)
    targets = torch.zeros_like(tokens, dtype=torch.bool)
    for line, sequence in enumerate(sequences):
        start = 0
        for number, prompt, response in sequence:
            stop = start + len(prompt) + len(response)
            tokens[line, start:stop] = torch.tensor(prompt + response)
            documents[line, start:stop] = number
            targets[line, start + len(prompt) : stop] = True
            start = stop
    return {
        "tokens": tokens,
        "mask": documents >= 0,
        "targets": targets,
        "document_ids": documents,
        "rows": torch.arange(len(rows)),
    }
