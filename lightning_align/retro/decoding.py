"""Generation with retrieval on the fly: one forward pass a token, one search every m tokens.

Nothing is computed twice: the decoder keeps its keys and values, and of the neighbours only those of each row's last full
chunk are kept, as the keys and values of each reading layer. Once a row completes a chunk, its neighbours are searched,
encoded, and take the place of those before.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.language_model import Head
from lightning_align.retrieval.search import Found, Retriever
from lightning_align.retro.attention import ChunkedCrossAttention
from lightning_align.retro.model import RETRO, NeighborTokens


@dataclass
class RetrievalCache:
    """The past of B rows: the decoder's own, and what reading needs of it."""

    decoder: Any
    """The decoder's cache."""
    chunk: Tensor
    """(B, M) tokens of the chunk that each row is in, at their place in it."""
    states: Tensor
    """(B, M, D) hidden states of the same before the first reading layer."""
    keys: Tensor
    """(layers, B, J R, K) of the neighbours of each row's last full chunk."""
    values: Tensor
    """(layers, B, J R, K)."""
    mask: Tensor
    """(B, J R) bool."""
    started: bool = False


class RetrievalDecoder(nn.Module):
    """A RETRO model with a retriever, as a language model that `generate` can decode.

    What was found is remembered by chunk: several samples of a prompt search for it once.
    """

    def __init__(self, model: RETRO, retriever: Retriever, *, num_neighbors: int) -> None:
        """Join the two.

        Args:
            model: its parameters are used, not copied.
            retriever: over chunks of the model's size.
            num_neighbors: J, neighbours of each chunk.

        Raises:
            ValueError: if the sizes of their chunks differ, or there are no neighbours to find.
        """
        super().__init__()
        if retriever.chunk_size != model.chunk_size:
            raise ValueError(
                f"the retriever has chunks of {retriever.chunk_size} tokens and the model of {model.chunk_size}: build the "
                "database with the model's chunk_size, or train the model with the database's"
            )
        if num_neighbors < 1:
            raise ValueError(
                f"num_neighbors is {num_neighbors}; to decode without neighbours give the model itself to generate"
            )
        self.model, self.retriever, self.num_neighbors = model, retriever, num_neighbors
        self.found: dict[tuple[int, ...], Found] = {}
        """What was found for each chunk so far, (1, J) a chunk."""

    @property
    def head(self) -> Head:
        """That of the model."""
        return self.model.head

    @property
    def max_seq_len(self) -> int | None:
        """That of the model's decoder; None if it does not say."""
        return self.model.max_seq_len

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits without neighbours."""
        logits: Tensor = self.model(tokens)
        return logits

    def make_cache(self, batch: int, length: int) -> RetrievalCache:
        """Room for the past.

        Args:
            batch: B.
            length: columns that will be decoded.
        """
        model = self.model
        decoder = model.make_cache(batch, length)
        weight = model.head.weight
        size, span = model.chunk_size, 2 * model.chunk_size * self.num_neighbors
        cross = model.cross[0]
        assert isinstance(cross, ChunkedCrossAttention)

        def room(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

        return RetrievalCache(
            decoder,
            chunk=torch.zeros(batch, size, dtype=torch.long, device=weight.device),
            states=room(batch, size, weight.shape[1]),
            keys=room(len(model.cross), batch, span, cross.dim_head),
            values=room(len(model.cross), batch, span, cross.dim_head),
            mask=torch.zeros(batch, span, dtype=torch.bool, device=weight.device),
        )

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: RetrievalCache | None = None,
    ) -> Tensor:
        """Final hidden states of new tokens.

        Args:
            tokens: (B, N) int64: first the prompts, padded on the left; then one token a row at a time.
            mask: (B, M) bool, true at the columns so far that exist; None if all do.
            positions: (B, N) int64 of the new tokens in their rows.
            cache: from `make_cache`; extended in place. Without it there is nothing to retrieve for.

        Returns:
            (B, N, D).
        """
        if cache is None or positions is None:
            return self.model.hidden(tokens, mask=mask, positions=positions)
        read: _Prompt | _Step
        if not cache.started:
            lengths = positions[:, -1] + 1
            read, cache.started = _Prompt(self, cache, tokens, lengths), True
        else:
            assert tokens.shape[1] == 1
            read = _Step(self, cache, tokens[:, 0], positions[:, 0])
        with self.model.reading(read):
            return self.model.hidden(tokens, mask=mask, positions=positions, cache=cache.decoder)

    def search(self, chunks: Tensor) -> NeighborTokens:
        """Neighbours of chunks, (G, M) -> (G, J, R)."""
        queries = [tuple(chunk) for chunk in chunks.tolist()]
        if new := list(dict.fromkeys(query for query in queries if query not in self.found)):
            found = self.retriever.search([list(query) for query in new], self.num_neighbors)
            for place, query in enumerate(new):
                one = slice(place, place + 1)
                tokens = type(found.tokens)(found.tokens.ids[one], found.tokens.mask[one])
                self.found[query] = Found(found.ids[one], found.mask[one], found.distances[one], tokens)
        results = [self.found[query] for query in queries]
        return NeighborTokens(
            torch.cat([torch.from_numpy(r.tokens.ids) for r in results]).to(chunks.device),
            torch.cat([torch.from_numpy(r.tokens.mask & r.mask[..., None]) for r in results]).to(chunks.device),
        )


class _Prompt:
    """Reads in whole prompts, which begin at different columns."""

    def __init__(self, owner: RetrievalDecoder, cache: RetrievalCache, tokens: Tensor, lengths: Tensor) -> None:
        self.model, self.cache, self.lengths = owner.model, cache, lengths
        size = self.size = self.model.chunk_size
        self.columns = torch.arange(tokens.shape[1], device=tokens.device)
        self.starts = (tokens.shape[1] - lengths)[:, None]
        self.chunks = int(lengths.max()) // size
        full = (lengths // size)[:, None] > torch.arange(self.chunks, device=tokens.device)
        self.rows, self.numbers = full.nonzero(as_tuple=True)
        left = self._left(tokens)
        cache.chunk.copy_(self._last(left))
        self.last = (lengths // size - 1).clamp(min=0)
        self.filled = lengths >= size
        if self.chunks:
            chunks = rearrange(left[:, : self.chunks * size], "b (u m) -> b u m", m=size)
            self.neighbors = owner.search(chunks[self.rows, self.numbers])
        self.encodings: Tensor | None = None

    def _left(self, x: Tensor) -> Tensor:
        """Rows with their beginning at column 0; what stands behind their end means nothing."""
        return _columns(x, (self.columns + self.starts).clamp(max=x.shape[1] - 1))

    def _last(self, x: Tensor) -> Tensor:
        """For each place of a chunk, what stood there last: (B, N, ...) -> (B, M, ...)."""
        last = (self.lengths - 1)[:, None]
        places = torch.arange(self.size, device=x.device)
        return _columns(x, (last - (last - places) % self.size).clamp(min=0))

    def __call__(self, index: int, x: Tensor) -> Tensor:
        left = self._left(x)
        if index == 0:
            self.cache.states.copy_(self._last(left))
        if not self.chunks:
            return torch.zeros_like(x)
        if self.encodings is None:
            chunks = rearrange(left[:, : self.chunks * self.size], "b (u m) d -> b u m d", m=self.size)
            self.encodings = self.model.encode(self.neighbors, chunks[self.rows, self.numbers])
        cross = self.model.cross[index]
        assert isinstance(cross, ChunkedCrossAttention)
        shape = x.shape[0], self.chunks
        keys, values, mask = (
            part.new_zeros(*shape, *part.shape[1:]).index_put((self.rows, self.numbers), part)
            for part in (*cross.neighbor_keys_values(self.encodings), self.neighbors.mask.flatten(-2))
        )
        every = torch.arange(x.shape[0], device=x.device)
        self.cache.keys[index], self.cache.values[index] = keys[every, self.last], values[every, self.last]
        self.cache.mask.copy_(mask[every, self.last] & self.filled[:, None])
        read = cross.read(left, keys, values, mask, chunk_size=self.size)
        # Back to the right; what a pad got, its row's first token, nobody looks at.
        return _columns(read, (self.columns - self.starts).clamp(min=0))


class _Step:
    """Reads at one new token a row."""

    def __init__(self, owner: RetrievalDecoder, cache: RetrievalCache, tokens: Tensor, positions: Tensor) -> None:
        self.model, self.cache = owner.model, cache
        size = self.model.chunk_size
        self.every = torch.arange(len(tokens), device=tokens.device)
        self.place = positions % size
        # The last token of a chunk is at m - 1 from where its neighbours begin, and so on to 2 m - 2.
        self.reader = (positions + 1) % size + size - 1
        cache.chunk[self.every, self.place] = tokens
        self.done = (self.place == size - 1).nonzero().squeeze(1)
        if len(self.done):
            self.neighbors = owner.search(cache.chunk[self.done])
            cache.mask[self.done] = self.neighbors.mask.flatten(-2)
        self.encodings: Tensor | None = None

    def __call__(self, index: int, x: Tensor) -> Tensor:
        cache, cross = self.cache, self.model.cross[index]
        assert isinstance(cross, ChunkedCrossAttention)
        if index == 0:
            cache.states[self.every, self.place] = x[:, 0].to(cache.states.dtype)
        if len(self.done):
            if self.encodings is None:
                self.encodings = self.model.encode(self.neighbors, cache.states[self.done])
            keys, values = cross.neighbor_keys_values(self.encodings)
            cache.keys[index, self.done] = keys.to(cache.keys.dtype)
            cache.values[index, self.done] = values.to(cache.values.dtype)
        read: Tensor = cross(
            x, self.reader[:, None], cache.keys[index].to(x.dtype), cache.values[index].to(x.dtype), cache.mask
        )
        return read


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """Chosen columns of each row: (B, N, ...), (B, C) -> (B, C, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], columns]
