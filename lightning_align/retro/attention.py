"""Cross-attention between two sequences, and chunked cross-attention from text to retrieved neighbors.

Borgeaud et al. 2021, arXiv 2112.04426, section 2.4 and appendix B.1. A text is cut into chunks of m tokens. The neighbors of
chunk u are known at its last token, position m u + m - 1. From there on, m positions attend to them. The last of these is the
second-to-last position of chunk u + 1, which predicts the last token of that chunk. The first m - 1 positions of a text attend
to no neighbors.

Shapes, in addition to the legend in `lightning_align/types.py`: ``G`` chunks of a whole batch, ``U`` chunks of a row, ``M``
tokens of a chunk, ``J`` neighbors of a chunk, ``R`` tokens of a neighbor, ``S`` tokens that a query can attend to, ``E`` width
of the encodings.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.palm import LayerNorm, rotary, rotate
from lightning_align.models.sdpa import dot_product_attention
from lightning_align.models.varlen import VarlenAttention


def reading_positions(x_BND: Tensor, num_chunks: int, chunk_size: int) -> Tensor:
    """Select the positions that attend to the neighbors of each chunk: (B, N, D) -> (B, U, M, D).

    Args:
        x_BND: (B, N, D) values at each position of the rows.
        num_chunks: U, the number of chunks per row.
        chunk_size: M, the number of tokens per chunk.

    Returns:
        (B, U, M, D) values, with zeros past the end of the row.
    """
    first = chunk_size - 1
    x_BND = F.pad(x_BND[:, first:], (0, 0, 0, max(0, num_chunks * chunk_size - (x_BND.shape[1] - first))))
    return rearrange(x_BND[:, : num_chunks * chunk_size], "b (u m) d -> b u m d", m=chunk_size)


def from_reading_positions(read_BUMD: Tensor, length: int) -> Tensor:
    """Invert `reading_positions`: (B, U, M, D) -> (B, N, D).

    Args:
        read_BUMD: (B, U, M, D) values at the reading positions.
        length: N, the number of positions of a row.

    Returns:
        (B, N, D) values, with zeros at positions that attend to no neighbors.
    """
    read = rearrange(read_BUMD, "b u m d -> b (u m) d")
    first = read_BUMD.shape[2] - 1
    return F.pad(read, (0, 0, first, max(0, length - first - read.shape[1])))[:, :length]


class CrossAttention(nn.Module):
    """Multi-query attention to another sequence, with rotary positions.

    The output is exactly 0 for a query without any token to attend to. Query and key positions have a common origin, so the
    scores depend on the distance only.
    """

    def __init__(self, dim: int, context_dim: int, *, heads: int, dim_head: int, dropout: float, zero_init: bool) -> None:
        """Build and initialize the layer.

        Args:
            dim: D, the width of the queries and of the output.
            context_dim: The width of the other sequence.
            heads: The number of query heads. Keys and values have one head.
            dim_head: The width of a head. Must be even.
            dropout: The dropout probability on the attention weights.
            zero_init: Whether to initialize the output projection to 0, so that the layer starts without effect.
        """
        super().__init__()
        self.heads, self.dim_head, self.dropout, self.zero_init = heads, dim_head, dropout, zero_init
        self.key_width = dim_head
        self.norm = LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the gain to 1 and the weights from N(0, 1 / fan_in). The output projection is 0 with `zero_init`."""
        nn.init.ones_(self.norm.weight)
        for linear in (self.to_q, self.to_kv, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if self.zero_init:
            nn.init.zeros_(self.out.weight)

    def keys_values(self, context: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of the other sequence.

        Args:
            context: (..., S, E) vectors of the other sequence.
            positions: (S,) or (..., S) int64 positions.

        Returns:
            Keys and values, each (..., S, K).
        """
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        table = rotary(positions, self.dim_head, xpos_scale_base=None)
        return rotate(keys, table.k_cos, table.k_sin), values

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend to the other sequence. The residual is not added.

        Args:
            x: (G, N, D) inputs of the queries.
            positions: (N,) or (G, N) int64 positions of the queries.
            keys: (G, S, K) keys from `keys_values`.
            values: (G, S, K) values from `keys_values`.
            mask: (G, S) bool, true at real tokens of the other sequence.

        Returns:
            (G, N, D) outputs. They are 0 for each row of the mask that is all false.
        """
        table = rotary(positions, self.dim_head, xpos_scale_base=None)
        q = rotate(rearrange(self.to_q(self.norm(x)), "g n (h k) -> g n h k", h=self.heads), table.q_cos, table.q_sin)
        # Keys have one head, so the heads of a query can be treated as more queries. This avoids repeating the keys.
        q, keys, values = rearrange(q, "g n h k -> g 1 (n h) k"), keys.unsqueeze(1), values.unsqueeze(1)
        seen = mask.any(dim=-1)
        # A softmax over an empty set is NaN. Rows that are fully masked attend to everything, and their output is set to 0.
        allowed = (mask | ~seen[:, None])[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = dot_product_attention(q, keys, values, attn_mask=allowed, dropout_p=dropout)
        mixed = rearrange(mixed, "g 1 (n h) k -> g n (h k)", h=self.heads)
        read: Tensor = self.out(mixed.masked_fill(~seen[:, None, None], 0))
        return read

    def packed(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, attend: VarlenAttention) -> Tensor:
        """Attend to the other sequence without padding. The residual is not added.

        Args:
            x: (T, D) inputs of the queries.
            positions: (T,) int64 positions of the queries.
            keys: (S, K) keys from `keys_values`.
            values: (S, K) values from `keys_values`.
            attend: Which keys each query sees.

        Returns:
            (T, D) outputs. They are 0 for queries that see nothing.
        """
        table = rotary(positions, self.dim_head, xpos_scale_base=None)
        q = rotate(rearrange(self.to_q(self.norm(x)), "t (h k) -> t h k", h=self.heads), table.q_cos, table.q_sin)
        dropout = self.dropout if self.training else 0.0
        read: Tensor = self.out(attend(q, keys, values, scale=self.dim_head**-0.5, dropout=dropout).flatten(-2))
        return read


class ChunkReading(nn.Module):
    """Attention from whole rows of the decoder to the neighbors of their chunks.

    A neighbor is aligned with the chunk that it was retrieved for. Its continuation is aligned with the next chunk. Position
    m u + m - 1 + i is the i-th position that attends to the neighbors of chunk u. Its relative position is i + m - 1. The
    relative position of token i' of a neighbor is i'. Their distance is d(i, i') = i - i' + m - 1, for each neighbor (appendix
    B.1.2).
    """

    key_width: int
    """The width of the keys of a token, and of its values."""

    def neighbor_keys_values(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of neighbors: (..., J, R, E) -> two tensors (..., J R, K)."""
        raise NotImplementedError

    def read(self, x_BND: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, chunk_size: int) -> Tensor:
        """Attend to the neighbors in whole rows that start at position 0.

        Args:
            x_BND: (B, N, D) inputs of the queries.
            keys: (B, U, S, K) keys, with S = J R: the neighbors of a chunk are concatenated.
            values: (B, U, S, K) values.
            mask: (B, U, S) bool, true at real tokens.
            chunk_size: M, the number of tokens per chunk.

        Returns:
            (B, N, D) outputs, without the residual.
        """
        rows, chunks = keys.shape[:2]
        queries = reading_positions(x_BND, chunks, chunk_size).flatten(0, 1)
        positions = torch.arange(chunk_size, device=x_BND.device) + chunk_size - 1
        read: Tensor = self(queries, positions, keys.flatten(0, 1), values.flatten(0, 1), mask.flatten(0, 1))
        return from_reading_positions(rearrange(read, "(b u) m d -> b u m d", b=rows), x_BND.shape[1])


class ChunkedCrossAttention(ChunkReading, CrossAttention):
    """Cross-attention to the neighbors of chunks.

    The output is 0 for chunks without neighbors. With `zero_init`, as in `RETRO`, it is 0 everywhere before training.
    """

    def neighbor_keys_values(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of neighbors: (..., J, R, E) -> two tensors (..., J R, K)."""
        keys, values = self.keys_values(encodings, torch.arange(encodings.shape[-2], device=encodings.device))
        return keys.flatten(-3, -2), values.flatten(-3, -2)
