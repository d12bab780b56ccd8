"""Generation with live retrieval: one forward pass per token and one search per chunk of m tokens.

The cache avoids repeated computation. The decoder caches its keys and values. For the neighbors, the cache holds the keys and
values of each cross-attention layer, for the last full chunk of each row only. When a row completes a chunk, the decoder
searches and encodes the neighbors of that chunk. They replace the previous ones.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.language_model import Head
from lightning_align.retrieval.search import Found, Retriever
from lightning_align.retro.attention import ChunkReading
from lightning_align.retro.model import RETRO, NeighborTokens
from lightning_align.retro.static import StaticRetrieval, StepRetrieval
from lightning_align.runtime.transfer import to_device


@dataclass
class RetrievalCache:
    """The cache of B rows: the cache of the decoder, and the state of the cross-attention."""

    decoder: Any
    """The cache of the decoder."""
    chunk: Tensor
    """(B, M) tokens of the current chunk of each row, indexed by their place in the chunk."""
    states: Tensor
    """(B, M, D) hidden states of these tokens at the input of the first cross-attention."""
    keys: Tensor
    """(layers, B, J R, K) keys of the neighbors of the last full chunk of each row."""
    values: Tensor
    """(layers, B, J R, K) values of these neighbors."""
    mask: Tensor
    """(B, J R) bool, true at real tokens of these neighbors."""
    started: bool = False
    """Whether the prompts have been processed."""
    lengths: list[int] = field(default_factory=list)
    """The number of tokens that each row has, on the host, so that no step has to ask the device which chunks are complete."""

    @property
    def static(self) -> Callable[[int, int], StaticRetrieval] | None:
        """A function that makes an empty cache of fixed size. See `lightning_align.models.static_cache`."""
        return partial(StaticRetrieval, self) if callable(getattr(self.decoder, "static", None)) else None


class RetrievalDecoder(nn.Module):
    """A RETRO model with a retriever, as a language model for `generate`.

    Search results are cached per chunk, so several samples of a prompt search only once. Several decoders, also in several
    threads, can share a model and a retriever. `GivenNeighbors` is a retriever for neighbors of your own.
    """

    def __init__(self, model: RETRO, retriever: Retriever, *, num_neighbors: int, max_found: int = 1 << 16) -> None:
        """Combine a model and a retriever.

        Args:
            model: The model. Its parameters are shared, not copied.
            retriever: The retriever. Its chunk size must be that of the model.
            num_neighbors: J, the number of neighbors per chunk.
            max_found: The number of chunks whose search results are kept. Those that were used last stay. A result takes 9
                bytes per token of its neighbors, 2 kB for two neighbors of 128 tokens.

        Raises:
            ValueError: If the chunk sizes differ, or if `num_neighbors` or `max_found` is less than 1.
        """
        super().__init__()
        if retriever.chunk_size != model.chunk_size:
            raise ValueError(
                f"`retriever` and `model` must have the same chunk_size, but got {retriever.chunk_size} for the retriever and "
                f"{model.chunk_size} for the model. Build the database with the chunk_size of the model, or train the model "
                "with that of the database."
            )
        if num_neighbors < 1:
            raise ValueError(
                f"`num_neighbors` must be at least 1, but got {num_neighbors}. To generate without neighbors, pass the RETRO "
                "model itself to generate."
            )
        if max_found < 1:
            raise ValueError(f"`max_found` must be at least 1, but got {max_found}. Each search result is used once at least.")
        self.model, self.retriever, self.num_neighbors, self.max_found = model, retriever, num_neighbors, max_found
        self.needs_mask = True
        """That prompts of different lengths must have a mask, also with padding on the right."""
        self.found: dict[tuple[int, ...], Found] = {}
        """The last search results, by the tokens of the chunk. Each has shape (1, J)."""

    @property
    def head(self) -> Head:
        """The output layer of the model."""
        return self.model.head

    @property
    def max_seq_len(self) -> int | None:
        """The maximum number of tokens that the model's decoder can process. None if it does not define one."""
        return self.model.max_seq_len

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids that the model declares."""
        return self.model.eos_ids

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits without neighbors."""
        logits: Tensor = self.model(tokens)
        return logits

    def make_cache(self, batch: int, length: int) -> RetrievalCache:
        """Make an empty cache.

        Args:
            batch: B, the number of rows.
            length: The number of columns that will be decoded.
        """
        model = self.model
        decoder = model.make_cache(batch, length)
        weight = model.head.weight
        size, span = model.chunk_size, 2 * model.chunk_size * self.num_neighbors
        cross = model.cross[0]
        assert isinstance(cross, ChunkReading)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

        return RetrievalCache(
            decoder,
            chunk=torch.zeros(batch, size, dtype=torch.long, device=weight.device),
            states=zeros(batch, size, weight.shape[1]),
            keys=zeros(len(model.cross), batch, span, cross.key_width),
            values=zeros(len(model.cross), batch, span, cross.key_width),
            mask=torch.zeros(batch, span, dtype=torch.bool, device=weight.device),
        )

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: RetrievalCache | StepRetrieval | None = None,
    ) -> Tensor:
        """Compute the final hidden states of new tokens.

        Args:
            tokens: (B, N) int64 token ids. The first call takes the prompts, padded on either side. Later calls take one token
                per row.
            mask: (B, S) bool, true at real tokens among all S columns so far. None if there is no padding.
            positions: (N,) or (B, N) int64 positions of the new tokens in their rows.
            cache: The cache from `make_cache`, updated in place. Without a cache or positions, nothing is retrieved.

        Returns:
            (B, N, D) hidden states.
        """
        with _lock_of(self.model):
            return self._hidden(tokens, mask=mask, positions=positions, cache=cache)

    def _hidden(
        self, tokens: Tensor, *, mask: Tensor | None, positions: Tensor | None, cache: RetrievalCache | StepRetrieval | None
    ) -> Tensor:
        if cache is None or positions is None:
            return self.model.hidden(tokens, mask=mask, positions=positions)
        read: _PromptReader | _StepReader
        if isinstance(cache, StepRetrieval) or cache.started:
            assert tokens.shape[1] == 1
            read = _StepReader(self, cache, tokens[:, 0], positions[:, 0], self._complete(cache))
        else:
            read, cache.started = _PromptReader(self, cache, tokens, mask), True
        with self.model.reading(read):
            return self.model.hidden(tokens, mask=mask, positions=positions, cache=cache.decoder)

    def _complete(self, cache: "RetrievalCache | StepRetrieval") -> list[int]:
        """Return the rows whose chunk the next token completes. Which they are is known on the host."""
        if isinstance(cache, StepRetrieval):
            return cache.state.complete
        most = self.max_seq_len or sys.maxsize
        cache.lengths = [min(length + 1, most) for length in cache.lengths]
        return [row for row, length in enumerate(cache.lengths) if length % self.model.chunk_size == 0]

    def search(self, chunks: Tensor) -> NeighborTokens:
        """Search for the neighbors of chunks: (G, M) -> (G, J, R)."""
        queries = [tuple(chunk) for chunk in chunks.tolist()]
        if new := list(dict.fromkeys(query for query in queries if query not in self.found)):
            found = self.retriever.search([list(query) for query in new], self.num_neighbors)
            for place, query in enumerate(new):
                one = slice(place, place + 1)
                tokens = type(found.tokens)(found.tokens.ids[one], found.tokens.mask[one])
                self.found[query] = Found(found.ids[one], found.mask[one], found.distances[one], tokens)
        results = [self.found[query] for query in queries]
        for query in dict.fromkeys(queries):
            self.found[query] = self.found.pop(query)  # the last used come last
        for query in list(self.found)[: max(0, len(self.found) - self.max_found)]:
            del self.found[query]
        return NeighborTokens(
            *(
                torch.from_numpy(np.concatenate(parts)).to(chunks.device, non_blocking=True)
                for parts in ([r.tokens.ids for r in results], [r.tokens.mask & r.mask[..., None] for r in results])
            )
        )


_locks: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
"""A lock per model. Cross-attention is added to the blocks of the decoder by hooks, which threads must not mix."""


def _lock_of(model: nn.Module) -> threading.Lock:
    return _locks.setdefault(model, threading.Lock())


class _PromptReader:
    """A `Read` for whole prompts, which start at different columns."""

    def __init__(self, owner: RetrievalDecoder, cache: RetrievalCache, tokens: Tensor, mask: Tensor | None) -> None:
        self.model, self.cache = owner.model, cache
        size = self.size = self.model.chunk_size
        self.columns = torch.arange(tokens.shape[1], device=tokens.device)
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
            cache.lengths = [tokens.shape[1]] * len(tokens)
        self.lengths, self.starts = mask.sum(dim=1), mask.int().argmax(dim=1, keepdim=True)
        lengths = self.lengths
        cache.lengths = cache.lengths or lengths.tolist()
        self.chunks = max(cache.lengths) // size
        pairs = [(row, number) for row, length in enumerate(cache.lengths) for number in range(length // size)]
        self.rows, self.numbers = to_device([list(part) for part in zip(*pairs, strict=True)] or [[], []], tokens.device).long()
        left = self._align_left(tokens)
        cache.chunk.copy_(self._last_per_place(left))
        self.last = (lengths // size - 1).clamp(min=0)
        self.filled = lengths >= size
        if self.chunks:
            chunks = rearrange(left[:, : self.chunks * size], "b (u m) -> b u m", m=size)
            self.neighbors = owner.search(chunks[self.rows, self.numbers])
        self.encodings: Tensor | None = None
        if self.chunks and not self.model.conditioned:
            self.encodings = self.model.encode(self.neighbors)  # now, because the decoder may be the encoder

    def _align_left(self, x: Tensor) -> Tensor:
        """Shift each row to start at column 0. The values after the end of a row are undefined."""
        return _select_columns(x, (self.columns + self.starts).clamp(max=x.shape[1] - 1))

    def _last_per_place(self, x: Tensor) -> Tensor:
        """Take the last value at each place of a chunk: (B, N, ...) -> (B, M, ...)."""
        last = (self.lengths - 1)[:, None]
        places = torch.arange(self.size, device=x.device)
        return _select_columns(x, (last - (last - places) % self.size).clamp(min=0))

    def __call__(self, index: int, x: Tensor) -> Tensor:
        left = self._align_left(x)
        if index == 0:
            self.cache.states.copy_(self._last_per_place(left))
        if not self.chunks:
            return torch.zeros_like(x)
        if self.encodings is None:
            chunks = rearrange(left[:, : self.chunks * self.size], "b (u m) d -> b u m d", m=self.size)
            self.encodings = self.model.encode(self.neighbors, chunks[self.rows, self.numbers])
        cross = self.model.cross[index]
        assert isinstance(cross, ChunkReading)
        shape = x.shape[0], self.chunks
        keys, values, mask = (
            part.new_zeros(*shape, *part.shape[1:]).index_put((self.rows, self.numbers), part)
            for part in (*cross.neighbor_keys_values(self.encodings), self.neighbors.mask.flatten(-2))
        )
        every = torch.arange(x.shape[0], device=x.device)
        self.cache.keys[index], self.cache.values[index] = keys[every, self.last], values[every, self.last]
        self.cache.mask.copy_(mask[every, self.last] & self.filled[:, None])
        read = cross.read(left, keys, values, mask, chunk_size=self.size)
        # Shift the rows back to the right. A padded column gets the value of the first token of its row, which is never used.
        return _select_columns(read, (self.columns - self.starts).clamp(min=0))


class _StepReader:
    """A `Read` for one new token per row."""

    def __init__(
        self, owner: RetrievalDecoder, cache: RetrievalCache | StepRetrieval, tokens: Tensor, positions: Tensor, done: list[int]
    ) -> None:
        self.model, self.cache = owner.model, cache
        size = self.model.chunk_size
        self.every = torch.arange(len(tokens), device=tokens.device)
        self.place = positions % size
        # Query positions relative to the start of the neighbors: m - 1 at the last token of a chunk, up to 2 m - 2.
        self.reader = (positions + 1) % size + size - 1
        cache.chunk[self.every, self.place] = tokens
        self.done: Tensor | None = None
        if done:
            self.done = to_device(done, tokens.device)
            self.neighbors = owner.search(cache.chunk[self.done])
            cache.mask[self.done] = self.neighbors.mask.flatten(-2)
        self.encodings: Tensor | None = None
        if self.done is not None and not self.model.conditioned:
            self.encodings = self.model.encode(self.neighbors)  # now, because the decoder may be the encoder

    def __call__(self, index: int, x: Tensor) -> Tensor:
        cache, cross = self.cache, self.model.cross[index]
        assert isinstance(cross, ChunkReading)
        if index == 0:
            cache.states[self.every, self.place] = x[:, 0].to(cache.states.dtype)
        if self.done is not None:
            if self.encodings is None:
                self.encodings = self.model.encode(self.neighbors, cache.states[self.done])
            keys, values = cross.neighbor_keys_values(self.encodings)
            cache.keys[index, self.done] = keys.to(cache.keys.dtype)
            cache.values[index, self.done] = values.to(cache.values.dtype)
        read: Tensor = cross(
            x, self.reader[:, None], cache.keys[index].to(x.dtype), cache.values[index].to(x.dtype), cache.mask
        )
        return read


def _select_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Select columns of each row: (B, N, ...), (B, C) -> (B, C, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], columns]
