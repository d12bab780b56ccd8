"""Small RETRO models, random neighbors for them, and a retriever without a database."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_align.models.pretrained import PretrainedLM
from lightning_align.retrieval.search import Found
from lightning_align.retrieval.tables import Tokens
from lightning_align.retro.model import RETRO, NeighborTokens
from lightning_align.retro.reuse import GATE_SCALE
from tests.toys import VOCABULARY, tiny_palm

SIZE = 4


def tiny_retro(*, seed: int = 1, dtype: torch.dtype = torch.float32, **overrides: Any) -> RETRO:
    """Make a RETRO with a few thousand weights. No weight is 0, and the gains are random."""
    options: dict[str, Any] = {"chunk_size": SIZE, "cross_layers": [1, 3], "encoder_dim": 12, "heads": 2, "dim_head": 6}
    decoder = overrides.pop("decoder", None) or tiny_palm(depth=3)
    model = RETRO(decoder, **{**options, **overrides})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.cross.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.4 * noise)
    return model.to(dtype)


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500.0, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 6},
    "qwen3": {},
    "gemma": {"attention_bias": True},
    "stablelm": {"head_dim": 6, "partial_rotary_factor": 0.34},
}


def decoder_of(family: str, **options: Any) -> PretrainedLM:
    """A random model with weights far from 0, gains that differ, and biases."""
    torch.manual_seed(0)
    language = PretrainedLM(config={"model_type": family, **SIZES, **FAMILIES.get(family, {}), **options}, dtype="float32")
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
            assert parameter.abs().sum() > 0, name
    return language.eval()


def reusing(decoder: PretrainedLM, *, gate: float | None = 1.0, **options: Any) -> RETRO:
    """A RETRO around it in float64, whose gates let everything through."""
    arguments: dict[str, Any] = {"chunk_size": SIZE, "cross_layers": [2, 3], "train_decoder": False, "reuse_decoder": True}
    model = RETRO(decoder, **{**arguments, **options}).double().eval()
    if gate is not None:
        for index, cross in enumerate(model.cross):
            cross.gate.data.copy_(gate * torch.linspace(0.5, 1.5, 4) / GATE_SCALE * (1 + index))  # type: ignore[union-attr, operator]
    return model


def tokens_and_neighbors(
    rows: int, length: int, *, neighbors: int = 2, size: int = SIZE, holes: bool = True, seed: int = 0
) -> tuple[Tensor, NeighborTokens]:
    """Make random rows with random neighbors of each full chunk. With `holes`, some neighbors are missing or short."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    shape = rows, length // size, neighbors, 2 * size
    found = torch.randint(1, VOCABULARY, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.bool)
    if holes:
        lengths = torch.randint(0, 2 * size + 1, shape[:3], generator=generator)
        mask = torch.arange(2 * size) < lengths[..., None]
    return tokens, NeighborTokens(found, mask)


class ToyRetriever:
    """Returns random chunks that depend only on the query. Sometimes it returns fewer than k."""

    tokenizer_fingerprint = "toy"

    def __init__(self, chunk_size: int = SIZE) -> None:
        self.chunk_size = chunk_size
        self.queries: list[list[int]] = []

    def search(self, queries: Sequence[ArrayLike], k: int, exclude: Sequence[Sequence[str]] | None = None) -> Found:
        """See `Retriever`."""
        parts = [self._one([int(i) for i in np.asarray(query)], k) for query in queries]
        ids, mask, distances, tokens, token_mask = (np.stack(part) for part in zip(*parts, strict=True))
        return Found(ids, mask, distances, Tokens(tokens, token_mask))

    def _one(self, query: list[int], k: int) -> tuple[Any, ...]:
        assert len(query) == self.chunk_size
        self.queries.append(query)
        random = np.random.default_rng(query)
        mask = np.arange(k) < random.integers(0, k + 1)
        lengths = random.integers(1, 2 * self.chunk_size + 1, k)
        token_mask = (np.arange(2 * self.chunk_size) < lengths[:, None]) & mask[:, None]
        tokens = random.integers(1, VOCABULARY, (k, 2 * self.chunk_size)) * token_mask
        distances = np.where(mask, np.sort(random.random(k)), np.inf).astype(np.float32)
        return random.integers(0, 99, k) * mask, mask, distances, tokens, token_mask
