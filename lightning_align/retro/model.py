"""The RETRO model: chunked cross-attention to retrieved neighbors, added between the layers of any decoder.

Borgeaud et al. 2021, "Improving language models by retrieving from trillions of tokens", arXiv 2112.04426.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_align.models.activations import Run, checkpointed
from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.language_model import Head, HiddenModel, context_length, declared_ends, has_cache, has_hidden
from lightning_align.models.unpadded import Unpadded
from lightning_align.retro.attention import ChunkedCrossAttention, ChunkReading
from lightning_align.retro.encoder import NeighborEncoder
from lightning_align.retro.reuse import copy_attention, layer_inputs
from lightning_align.retro.unpadded import UnpaddedReader

Read = Callable[[int, Tensor], Tensor]
"""Compute what a cross-attention layer adds: (index of the cross-attention, layer input (B, N, D)) -> (B, N, D)."""


class NeighborTokens(NamedTuple):
    """Token ids of the neighbors of some chunks. A neighbor is a chunk of the database followed by its continuation.

    The leading dimensions index the chunks: (B, U) for the chunks of each row, (G,) for the chunks of a whole batch.
    """

    tokens: Tensor
    """(..., J, R) int64 token ids."""
    mask: Tensor
    """(..., J, R) bool, true at real tokens. All false for a neighbor that does not exist."""

    def first(self, count: int) -> "NeighborTokens":
        """Keep the nearest ``count`` neighbors of each chunk.

        For a count of 0, keep one neighbor and mask it. Every parameter then still takes part in the computation, which DDP
        requires.

        Args:
            count: The number of neighbors to keep.

        Returns:
            (..., max(count, 1), R) tokens and mask.
        """
        kept = max(count, 1)
        mask = self.mask[..., :kept, :]
        return NeighborTokens(self.tokens[..., :kept, :], mask if count else torch.zeros_like(mask))


class RETRO(nn.Module):
    """A decoder whose layers attend to the neighbors of the preceding chunk.

    Without neighbors, the output equals the output of the decoder bit for bit.
    """

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
        reuse_decoder: bool = False,
    ) -> None:
        """Add an encoder of neighbors and cross-attention layers to a decoder.

        Args:
            decoder: The language model to extend. It must have `hidden`, `head` and `blocks`, as PaLM does.
            chunk_size: M, the number of tokens per chunk. The model retrieves once per chunk.
            cross_layers: The decoder layers that attend to the neighbors, counted from 1. The cross-attention runs before the
                layer. Default is every third layer from layer 6 on (6, 9 and 12 of 12). In a decoder with less than 9 layers it
                is every third layer from layer 3 on (3 and 6 of 6), or the last layer if there are less than 3. With
                `reuse_decoder` it is every layer of the last third (20 to 30 of 30).
            encoder_dim: E, the width of the encoder of neighbors. Default is the width of the decoder.
            encoder_depth: The number of layers of the encoder.
            heads: The number of query heads in the encoder and in the cross-attention. Keys and values have one head.
            dim_head: The width of a head. Must be even.
            ff_mult: The ratio of the width of the encoder's feed-forward layers to its width.
            conditioned: Whether the encoder attends to the chunk that the neighbors were retrieved for. If false, the encoding
                of a neighbor can be computed once and stored.
            dropout: The dropout probability in the encoder and on the weights of the cross-attention.
            train_decoder: Whether to train the decoder. If false, the decoder is frozen and its output without neighbors does
                not change.
            reuse_decoder: Whether the decoder's own layers encode the neighbors, and each cross-attention starts as a copy of
                the self-attention of its layer. A pretrained model then reads neighbors after much less training, but encodes
                them with more layers. Requires a `PretrainedLM` and `train_decoder=False`. The arguments of the encoder and of
                the heads are not used.

        Raises:
            ValueError: If the decoder lacks `hidden`, `head` or `blocks`, if a number is out of range, or if the attention of
                the decoder cannot be copied.
        """
        super().__init__()
        if isinstance(decoder, dict):
            decoder = build_backbone(decoder)
        # A checkpoint stores these arguments to rebuild the model.
        init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__", "decoder")}
        spec = backbone_spec(decoder)
        if spec is not None:
            self.init_args: dict[str, Any] = {"decoder": spec, **init_args}
        blocks = getattr(decoder, "blocks", None)
        if not has_hidden(decoder) or not isinstance(blocks, nn.ModuleList):
            raise ValueError(
                f"RETRO: `decoder` must have `hidden`, `head` and `blocks` (a ModuleList), but got a {type(decoder).__name__}. "
                "Use a PaLM or another model that has them."
            )
        if cross_layers is None:
            depth = len(blocks)
            thirds = range(6 if depth >= 9 else min(3, depth), depth + 1, 3)
            cross_layers = range(depth - depth // 3, depth + 1) if reuse_decoder else thirds
        self.cross_layers = tuple(cross_layers)
        if not self.cross_layers or any(not 1 <= layer <= len(blocks) for layer in self.cross_layers):
            raise ValueError(
                f"RETRO: `cross_layers` must name at least one of the layers 1 to {len(blocks)}, and no others, but got "
                f"{list(cross_layers)}."
            )
        if list(self.cross_layers) != sorted(set(self.cross_layers)):
            raise ValueError(
                f"RETRO: `cross_layers` must name each layer once and in ascending order, but got {list(cross_layers)}."
            )
        if chunk_size < 1:
            raise ValueError(f"RETRO: `chunk_size` must be at least 1, but got {chunk_size}.")
        if encoder_depth < 1:
            raise ValueError(f"RETRO: `encoder_depth` must be at least 1, but got {encoder_depth}.")
        if dim_head < 2 or dim_head % 2:
            raise ValueError(f"RETRO: `dim_head` must be even and at least 2, but got {dim_head}. Rotary positions need pairs.")
        if reuse_decoder and train_decoder:
            raise ValueError(
                "RETRO: `reuse_decoder` needs `train_decoder: false`, but got true. No gradient flows through the encodings of "
                "the decoder. Pass train_decoder=False."
            )
        width = decoder.head.weight.shape[1]
        self.decoder: HiddenModel = decoder
        self.chunk_size, self.conditioned = chunk_size, conditioned and not reuse_decoder
        self.encoder: NeighborEncoder | None = None
        if not train_decoder:
            decoder.requires_grad_(False)
        if reuse_decoder:
            self.cross = copy_attention(decoder, self._layers(), 2 * chunk_size, dropout=dropout)
            return
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

    def reset_parameters(self) -> None:
        """Initialize all parameters again, for example after ``to_empty`` on a model that was built on the meta device."""
        if self.encoder is None:
            raise ValueError("RETRO: with `reuse_decoder`, the parameters start from the decoder. Build the model again.")
        for module in (self.decoder, self.encoder, *self.cross):
            module.reset_parameters()

    # -- the interface of a language model

    @property
    def head(self) -> Head:
        """The output layer of the decoder."""
        return self.decoder.head

    @property
    def num_tokens(self) -> int:
        """V, the size of the vocabulary."""
        return self.head.weight.shape[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids that the decoder declares."""
        return declared_ends(self.decoder)

    @property
    def max_seq_len(self) -> int | None:
        """The maximum number of tokens that the decoder can process. None if the decoder does not define one."""
        return context_length(self.decoder)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers of the decoder."""
        blocks = self.decoder.blocks
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _layers(self) -> list[nn.Module]:
        """The layers of the decoder that have cross-attention."""
        return [self.blocks[layer - 1] for layer in self.cross_layers]

    def layers_to_recompute(self) -> list[tuple[nn.Module, Run]]:
        """Return the layers of the decoder and of the encoder, which run again with activation checkpointing."""
        return [(block, checkpointed) for block in (*self.blocks, *(self.encoder.blocks if self.encoder else ()))]

    def make_cache(self, batch: int, length: int) -> Any:
        """Make the key-value cache of the decoder, for generation without neighbors.

        `RetrievalDecoder` generates with neighbors.

        Args:
            batch: B, the number of rows.
            length: The number of columns that will be decoded.

        Raises:
            ValueError: If the decoder has no `make_cache`.
        """
        if not has_cache(self.decoder):
            raise ValueError(
                f"RETRO: the decoder must have `make_cache` for generation, but {type(self.decoder).__name__} has none."
            )
        return self.decoder.make_cache(batch, length)

    # -- attention to neighbors

    def encode(self, neighbors: NeighborTokens, chunk: Tensor | None = None) -> Tensor:
        """Encode the neighbors of some chunks.

        Args:
            neighbors: (G, J, R) neighbors of G chunks.
            chunk: (G, M, D) hidden states of those chunks at the input of the first cross-attention. Required if the encoder
                is conditioned.

        Returns:
            (G, J, R, E) encodings. With `reuse_decoder` these are the inputs of the layers with cross-attention.
        """
        if self.encoder is None:
            states = layer_inputs(self.decoder, self._layers(), neighbors.tokens.flatten(0, 1))
            return states.view(*neighbors.tokens.shape, -1)
        encodings: Tensor = self.encoder(neighbors.tokens, neighbors.mask, self.head.weight, chunk)
        return encodings

    @contextmanager
    def reading(self, read: Read) -> Iterator[None]:
        """Add cross-attention to the decoder inside a ``with`` block. The decoder is unchanged outside of it.

        Args:
            read: Called before each layer in `cross_layers`. Its result is added to the input of the layer.
        """

        def before(index: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
            return lambda _, inputs: (inputs[0] + read(index, inputs[0]), *inputs[1:])

        handles = [layer.register_forward_pre_hook(before(index)) for index, layer in enumerate(self._layers())]
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
        """Compute the final hidden states.

        Args:
            tokens: (B, N) int64 token ids. Padding must be on the right.
            neighbors: (B, U, J, R) neighbors of the first U chunks of each row. Neighbors of an incomplete chunk are not used.
                None runs the decoder alone.
            encodings: (B, U, J, R, E) stored encodings of those neighbors. Default is to compute them.
            **kwargs: Arguments for the decoder: `mask`, `positions`, `cache`. Only allowed without neighbors.

        Returns:
            (B, N, D) hidden states.

        Raises:
            ValueError: If encodings are given to a model with a conditioned encoder, or if decoder arguments are given together
                with neighbors.
        """
        if neighbors is None or tokens.shape[1] < self.chunk_size:
            return self.decoder.hidden(tokens, **kwargs)
        if given := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(
                f"RETRO: `neighbors` need whole rows that are padded on the right, but got {', '.join(given)}. Leave these "
                "out, or use RetrievalDecoder to generate."
            )
        if encodings is not None and self.conditioned:
            raise ValueError(
                "RETRO: `encodings` cannot be given, because a conditioned encoder depends on the chunk. Build the model with "
                "conditioned=False to store encodings."
            )
        chunks = tokens.shape[1] // self.chunk_size
        neighbors = NeighborTokens(neighbors.tokens[:, :chunks], neighbors.mask[:, :chunks])
        with self.reading(_RowReader(self, neighbors, encodings)):
            return self.decoder.hidden(tokens)

    def longest_unpadded(self, device: torch.device) -> float | None:
        """Return the length of the longest row that `unpadded_hidden` computes, or None if it should not be used."""
        limit: Any = getattr(self.decoder, "longest_unpadded", None)
        length: float | None = limit(device) if callable(limit) else None
        return length

    def unpadded_hidden(
        self,
        unpadded: Unpadded,
        *,
        neighbors: NeighborTokens | None = None,
        encodings: Tensor | None = None,
        lengths: NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Compute the final hidden states (T, D) of rows without their padding. See `hidden`.

        Args:
            unpadded: The tokens of the rows.
            neighbors: (B, U, J, R) neighbors of the first U chunks of each row.
            encodings: (B, U, J, R, E) stored encodings of those neighbors.
            lengths: (B, U, J) number of real tokens of each neighbor, on the host, if they come before its padding. The
                neighbors are then read without their padding too.
        """
        decoder: Any = self.decoder
        chunks = unpadded.shape[1] // self.chunk_size
        if neighbors is None or not chunks:
            hidden: Tensor = decoder.unpadded_hidden(unpadded)
            return hidden
        neighbors = NeighborTokens(neighbors.tokens[:, :chunks], neighbors.mask[:, :chunks])
        if lengths is not None:
            with self.reading(UnpaddedReader(self, unpadded, neighbors, lengths[:, :chunks], encodings)):
                hidden = decoder.unpadded_hidden(unpadded)
            return hidden
        read = _RowReader(self, neighbors, encodings)

        def packed(index: int, x: Tensor) -> Tensor:
            # Chunks and their neighbors are found in whole rows.
            return unpadded.select(read(index, unpadded.padded(x.view(-1, x.shape[-1])))).view_as(x)

        with self.reading(packed):
            hidden = decoder.unpadded_hidden(unpadded)
        return hidden

    def forward(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Compute the logits (B, N, V). The arguments are those of `hidden`."""
        return self.head.logits(self.hidden(tokens, **kwargs))


class _RowReader:
    """A `Read` for whole rows that start at position 0. It encodes the neighbors once."""

    def __init__(self, model: RETRO, neighbors: NeighborTokens, encodings: Tensor | None) -> None:
        self.model, self.neighbors = model, neighbors
        self.encodings = None if encodings is None else encodings[:, : neighbors.tokens.shape[1]]
        if self.encodings is None and not model.conditioned:
            self.encodings = self._encode(None)  # now, because the decoder may be the encoder

    def _encode(self, chunk: Tensor | None) -> Tensor:
        flat = NeighborTokens(self.neighbors.tokens.flatten(0, 1), self.neighbors.mask.flatten(0, 1))
        return rearrange(self.model.encode(flat, chunk), "(b u) j r e -> b u j r e", b=len(self.neighbors.tokens))

    def __call__(self, index: int, x: Tensor) -> Tensor:
        size = self.model.chunk_size
        if self.encodings is None:  # at the first cross-attention
            rows, chunks = self.neighbors.tokens.shape[:2]
            self.encodings = self._encode(x[:, : chunks * size].reshape(rows * chunks, size, -1))
        cross = self.model.cross[index]
        assert isinstance(cross, ChunkReading)
        keys, values = cross.neighbor_keys_values(self.encodings)
        return cross.read(x, keys, values, self.neighbors.mask.flatten(-2), chunk_size=size)
