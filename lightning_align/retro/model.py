"""RETRO: chunked cross-attention to retrieved neighbours, between the layers of any decoder.

Borgeaud et al. 2021, "Improving language models by retrieving from trillions of tokens", arXiv 2112.04426.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.language_model import Head, HiddenModel, context_length, has_cache, has_hidden
from lightning_align.retro.attention import ChunkedCrossAttention
from lightning_align.retro.encoder import NeighborEncoder

Read = Callable[[int, Tensor], Tensor]
"""What a layer reads: (index of the cross-attention, its input (B, N, D)) -> (B, N, D), added to the input."""


class NeighborTokens(NamedTuple):
    """Neighbours of chunks, each a chunk with its continuation. The chunks are those of a row, or of a whole batch."""

    tokens: Tensor
    """(..., J, R) int64."""
    mask: Tensor
    """(..., J, R) bool, true at tokens that exist; all false at a neighbour that does not."""

    def first(self, count: int) -> "NeighborTokens":
        """The nearest ``count`` of each chunk; of 0 one that is masked, so that every parameter still takes part."""
        kept = max(count, 1)
        mask = self.mask[..., :kept, :]
        return NeighborTokens(self.tokens[..., :kept, :], mask if count else torch.zeros_like(mask))


class RETRO(nn.Module):
    """A decoder that reads neighbours of the chunk before; without neighbours it is the decoder, bit for bit."""

    def __init__(
        self,
        decoder: nn.Module | dict[str, Any],
        *,
        chunk_size: int = 64,
        cross_layers: Sequence[int] | None = None,
        encoder_dim: int | None = None,
        encoder_depth: int = 2,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
        conditioned: bool = True,
        dropout: float = 0.0,
        train_decoder: bool = True,
    ) -> None:
        """Put cross-attention between the layers of a decoder.

        Args:
            decoder: a language model with `hidden`, `head` and `blocks`, such as PaLM.
            chunk_size: M, tokens of a chunk; one retrieval serves so many.
            cross_layers: layers of the decoder, counted from 1, that read the neighbours before they do anything else. By
                default every third up to the last: 6, 9 and 12 of 12 layers, 3 and 6 of 6, the last of less than 3.
            encoder_dim: E, width of the encoder of neighbours; by default that of the decoder.
            encoder_depth: its layers.
            heads: query heads of the encoder and of the cross-attention; keys and values have one.
            dim_head: width of a head, even.
            ff_mult: width of the encoder's feed-forward layers over its width.
            conditioned: whether the encoder sees the chunk that found the neighbours. Without it the encoding of a neighbour
                can be computed once and stored.
            dropout: in the encoder, and on the weights of the cross-attention.
            train_decoder: false freezes the decoder, and leaves what it does without neighbours as it is.

        Raises:
            ValueError: if the decoder offers too little, or a number is out of range.
        """
        super().__init__()
        if isinstance(decoder, dict):
            decoder = build_backbone(decoder)
        # What a checkpoint needs to build this model again.
        init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__", "decoder")}
        spec = backbone_spec(decoder)
        if spec is not None:
            self.init_args: dict[str, Any] = {"decoder": spec, **init_args}
        blocks = getattr(decoder, "blocks", None)
        if not has_hidden(decoder) or not isinstance(blocks, nn.ModuleList):
            raise ValueError(
                f"RETRO: decoder is a {type(decoder).__name__}, which does not offer `hidden`, `head` and `blocks` (a "
                "ModuleList): give a PaLM, or a model with these"
            )
        if cross_layers is None:
            depth = len(blocks)
            cross_layers = range(6 if depth >= 9 else min(3, depth), depth + 1, 3)
        self.cross_layers = tuple(cross_layers)
        if not self.cross_layers or any(not 1 <= layer <= len(blocks) for layer in self.cross_layers):
            raise ValueError(f"RETRO: cross_layers is {list(cross_layers)}; expected some of the layers 1 to {len(blocks)}")
        if list(self.cross_layers) != sorted(set(self.cross_layers)):
            raise ValueError(f"RETRO: cross_layers is {list(cross_layers)}; expected each layer once and in ascending order")
        if chunk_size < 1:
            raise ValueError(f"RETRO: chunk_size is {chunk_size}; it must be at least 1")
        if encoder_depth < 1:
            raise ValueError(f"RETRO: encoder_depth is {encoder_depth}; the encoder needs at least 1 layer")
        if dim_head < 2 or dim_head % 2:
            raise ValueError(f"RETRO: dim_head is {dim_head}; rotary positions need an even number of at least 2")
        width = decoder.head.weight.shape[1]
        self.decoder: HiddenModel = decoder
        self.chunk_size, self.conditioned = chunk_size, conditioned
        self.encoder = NeighborEncoder(
            encoder_dim or width,
            decoder_dim=width,
            depth=encoder_depth,
            heads=heads,
            dim_head=dim_head,
            ff_mult=ff_mult,
            conditioned=conditioned,
            dropout=dropout,
        )
        self.cross = nn.ModuleList(
            ChunkedCrossAttention(width, encoder_dim or width, heads=heads, dim_head=dim_head, dropout=dropout, zero_init=True)
            for _ in self.cross_layers
        )
        if not train_decoder:
            decoder.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Initialise everything again, after ``to_empty`` if the model was made on meta."""
        for module in (self.decoder, self.encoder, *self.cross):
            module.reset_parameters()

    # -- what a language model offers

    @property
    def head(self) -> Head:
        """That of the decoder."""
        return self.decoder.head

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.head.weight.shape[0]

    @property
    def max_seq_len(self) -> int | None:
        """The most tokens that the decoder can read; None if it does not say."""
        return context_length(self.decoder)

    @property
    def blocks(self) -> nn.ModuleList:
        """Those of the decoder."""
        blocks = self.decoder.blocks
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def make_cache(self, batch: int, length: int) -> Any:
        """The decoder's, for generation without neighbours; with them see `RetrievalDecoder`.

        Raises:
            ValueError: if the decoder has none.
        """
        if not has_cache(self.decoder):
            raise ValueError(f"RETRO: the decoder {type(self.decoder).__name__} has no `make_cache`, which decoding needs")
        return self.decoder.make_cache(batch, length)

    # -- reading

    def encode(self, neighbors: NeighborTokens, chunk: Tensor | None = None) -> Tensor:
        """Encodings of neighbours.

        Args:
            neighbors: of G chunks, (G, J, R).
            chunk: (G, M, D) hidden states of those chunks before the first reading layer, if the encoder is conditioned.

        Returns:
            (G, J, R, E).
        """
        encodings: Tensor = self.encoder(neighbors.tokens, neighbors.mask, self.head.weight, chunk)
        return encodings

    @contextmanager
    def reading(self, read: Read) -> Iterator[None]:
        """The decoder with cross-attention, for the length of a block; outside of it, it is what it was.

        Args:
            read: called before each layer that reads.
        """

        def before(index: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
            return lambda _, inputs: (inputs[0] + read(index, inputs[0]), *inputs[1:])

        handles = [
            self.blocks[layer - 1].register_forward_pre_hook(before(index)) for index, layer in enumerate(self.cross_layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hidden(
        self,
        tokens: Tensor,
        *,
        neighbors: NeighborTokens | None = None,
        encodings: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Final hidden states.

        Args:
            tokens: (B, N) int64, padded on the right if at all.
            neighbors: of the first U chunks of each row, (B, U, J, R); those of a chunk that the row does not fill are not
                read. None: the decoder alone.
            encodings: (B, U, J, R, E) of those neighbours, if they are stored.
            **kwargs: for the decoder, where there are no neighbours: `mask`, `positions`, `cache`.

        Returns:
            (B, N, D).

        Raises:
            ValueError: if stored encodings are given to a model whose encoder sees the chunk, or the decoder's arguments with
                neighbours.
        """
        if neighbors is None or tokens.shape[1] < self.chunk_size:
            return self.decoder.hidden(tokens, **kwargs)
        if given := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(f"RETRO.hidden takes neighbors for whole rows padded on the right, without {', '.join(given)}")
        if encodings is not None and self.conditioned:
            raise ValueError("RETRO: encodings depend on the chunk here and cannot be stored: build it with conditioned=False")
        chunks = tokens.shape[1] // self.chunk_size
        neighbors = NeighborTokens(neighbors.tokens[:, :chunks], neighbors.mask[:, :chunks])
        with self.reading(_WholeRows(self, neighbors, encodings)):
            return self.decoder.hidden(tokens)

    def forward(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Logits (B, N, V); the arguments are those of `hidden`."""
        return self.head.logits(self.hidden(tokens, **kwargs))


class _WholeRows:
    """Reads in rows that begin at position 0; encodes the neighbours when the first layer does."""

    def __init__(self, model: RETRO, neighbors: NeighborTokens, encodings: Tensor | None) -> None:
        self.model, self.neighbors = model, neighbors
        self.encodings = None if encodings is None else encodings[:, : neighbors.tokens.shape[1]]

    def __call__(self, index: int, x: Tensor) -> Tensor:
        size = self.model.chunk_size
        rows, chunks = self.neighbors.tokens.shape[:2]
        if self.encodings is None:
            flat = NeighborTokens(self.neighbors.tokens.flatten(0, 1), self.neighbors.mask.flatten(0, 1))
            chunk = x[:, : chunks * size].reshape(rows * chunks, size, -1) if self.model.conditioned else None
            self.encodings = rearrange(self.model.encode(flat, chunk), "(b u) j r e -> b u j r e", b=rows)
        cross = self.model.cross[index]
        assert isinstance(cross, ChunkedCrossAttention)
        keys, values = cross.neighbor_keys_values(self.encodings)
        return cross.read(x, keys, values, self.neighbors.mask.flatten(-2), chunk_size=size)
