"""Attention to neighbors without padding: of the decoder's tokens, of the neighbors, and of chunks that have no neighbors.

Only complete chunks are read from: position m u + m - 1 and the m - 1 after it attend to the neighbors of chunk u, and without
the last token of the chunk there are no such positions.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_align.models.attention import attention_dtype
from lightning_align.models.palm import rotary
from lightning_align.models.unpadded import Unpadded
from lightning_align.models.varlen import Segments, VarlenAttention, choose_kernel
from lightning_align.retro.encoder import NeighborEncoder
from lightning_align.runtime.transfer import to_device


class UnpaddedReader:
    """A `Read` for packed tokens (T, D). It encodes the neighbors once, at the first cross-attention."""

    def __init__(
        self, model: Any, unpadded: Unpadded, neighbors: Any, lengths: NDArray[np.int64], encodings: Tensor | None
    ) -> None:
        """Find out on the host which tokens read which neighbors.

        Args:
            model: The `RETRO` model.
            unpadded: The tokens of the decoder.
            neighbors: (B, U, J, R) `NeighborTokens`, neighbors of the first U chunks of each row.
            lengths: (B, U, J) number of real tokens of each neighbor.
            encodings: (B, U, J, R, E) stored encodings, or None to compute them.
        """
        self.model, device, size = model, unpadded.tokens.device, model.chunk_size
        rows = np.asarray(unpadded.segments.lengths)
        num_chunks = neighbors.tokens.shape[1]
        complete = (np.arange(num_chunks) + 1) * size <= rows[:, None]
        lengths = np.where(complete[..., None], lengths, 0)
        mask = neighbors.mask & to_device(complete, device)[..., None, None]
        self.neighbors = Unpadded.of(
            neighbors.tokens.flatten(0, 2), mask.flatten(0, 2), Segments.of_lengths(lengths.ravel().tolist(), device)
        )
        self.per_chunk = Segments.of_lengths(lengths.sum(-1).ravel().tolist(), device)
        # Tokens of complete chunks, and tokens that read: those from the last of the first chunk on.
        counts = np.minimum(rows // size, num_chunks)
        self.chunk_tokens = to_device(_ranges(rows, np.zeros_like(rows), counts * size), device)
        self.chunks = Segments.of_lengths((complete * size).ravel().tolist(), device)
        self.reading = to_device(_ranges(rows, np.minimum(rows, size - 1), rows), device)
        readers = np.clip(rows[:, None] - (np.arange(num_chunks) * size + size - 1), 0, size)
        self.readers = Segments.of_lengths(readers.ravel().tolist(), device)
        self.places = (unpadded.positions.index_select(0, self.reading) - (size - 1)) % size + size - 1
        self.encoded = None if encodings is None else self.neighbors.select(encodings[:, :num_chunks].flatten(0, 2))
        first: Any = model.cross[0]
        self.attend = _attention(first, self.readers, self.per_chunk, first.dropout if first.training else 0.0)

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Return what a cross-attention adds to packed tokens, (T, D) or (1, T, D)."""
        flat = x.view(-1, x.shape[-1])
        if self.encoded is None:
            chunk = flat.index_select(0, self.chunk_tokens) if self.model.conditioned else None
            assert self.model.encoder is not None, "a decoder that is reused has no unpadded form"
            self.encoded = self._encode(self.model.encoder, chunk)
        cross: Any = self.model.cross[index]
        keys, values = cross.keys_values(self.encoded, self.neighbors.positions)
        read: Tensor = cross.packed(flat.index_select(0, self.reading), self.places, keys, values, self.attend)
        return read.new_zeros(flat.shape).index_copy(0, self.reading, read).view_as(x)

    def _encode(self, encoder: NeighborEncoder, chunk: Tensor | None) -> Tensor:
        """Encode the tokens of all neighbors, (T', E). ``chunk`` are the tokens of the complete chunks, (C, D)."""
        tokens, places, segments = self.neighbors.tokens, self.neighbors.positions, self.neighbors.segments
        x: Tensor = encoder.embed(encoder.embedding_norm(F.embedding(tokens, self.model.head.weight)))
        block: Any = encoder.blocks[0]
        dropout = block.attn_dropout if block.training else 0.0
        kernel = choose_kernel(tokens.device, attention_dtype(block.in_proj.weight), encoder.dim_head, dropout=dropout)
        attend = VarlenAttention(segments, segments, False, kernel)
        table = rotary(places, encoder.dim_head, xpos_scale_base=None)
        if encoder.context_norm is not None:
            assert chunk is not None
            chunk = encoder.context_norm(chunk)
            within = torch.arange(len(chunk), device=chunk.device) % self.model.chunk_size
            first: Any = encoder.cross[0]
            look = _attention(first, self.per_chunk, self.chunks, first.dropout if first.training else 0.0)
        for layer, block in enumerate(encoder.blocks):
            x = block(x, table, attend)
            if encoder.context_norm is not None:
                cross: Any = encoder.cross[layer]
                keys, values = cross.keys_values(chunk, within)
                x = x + cross.packed(x, places, keys, values, look)
        encoded: Tensor = encoder.norm(x)
        return encoded


def _attention(cross: Any, queries: Segments, keys: Segments, dropout: float) -> VarlenAttention:
    dtype = attention_dtype(cross.to_q.weight)
    kernel = choose_kernel(queries.starts.device, dtype, cross.dim_head, dropout=dropout)
    return VarlenAttention(queries, keys, False, kernel)


def _ranges(lengths: NDArray[Any], starts: NDArray[Any], stops: NDArray[Any]) -> NDArray[np.int64]:
    """Return the indices of the tokens from a start to a stop of each row, among the tokens of all rows."""
    first = lengths.cumsum() - lengths
    parts = [np.arange(at + start, at + stop) for at, start, stop in zip(first, starts, stops, strict=True)]
    return np.concatenate(parts).astype(np.int64)
