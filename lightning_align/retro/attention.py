"""Attention from one sequence to another, and who reads whose neighbours.

Borgeaud et al. 2021, arXiv 2112.04426, section 2.4 and appendix B.1. A text is cut in chunks of m tokens. The neighbours of
chunk u are known once its last token is, at position m u + m - 1; from there on m positions read them, up to the last but one
of chunk u + 1, where the last token of that chunk is predicted. The first m - 1 positions read nothing.

Shapes, besides the suite's: ``G`` chunks of a whole batch, ``U`` chunks of a row, ``M`` tokens of a chunk, ``J`` neighbours of
a chunk, ``R`` tokens of a neighbour, ``S`` tokens that a query may look at.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.palm import LayerNorm, rotary, rotate


def reading_positions(x_BND: Tensor, num_chunks: int, chunk_size: int) -> Tensor:
    """The positions that read the neighbours of each chunk: (B, N, D) -> (B, U, M, D), with zeros past the end of the row."""
    first = chunk_size - 1
    x_BND = F.pad(x_BND[:, first:], (0, 0, 0, max(0, num_chunks * chunk_size - (x_BND.shape[1] - first))))
    return rearrange(x_BND[:, : num_chunks * chunk_size], "b (u m) d -> b u m d", m=chunk_size)


def from_reading_positions(read_BUMD: Tensor, length: int) -> Tensor:
    """The inverse, with zeros where nothing was read: (B, U, M, D) -> (B, N, D)."""
    read = rearrange(read_BUMD, "b u m d -> b (u m) d")
    first = read_BUMD.shape[2] - 1
    return F.pad(read, (0, 0, first, max(0, length - first - read.shape[1])))[:, :length]


class CrossAttention(nn.Module):
    """Multi-query attention to another sequence, with rotary positions; exactly 0 where there is nothing to look at.

    Positions of queries and keys count from a common origin, so that a product depends on their distance alone.
    """

    def __init__(self, dim: int, context_dim: int, *, heads: int, dim_head: int, dropout: float, zero_init: bool) -> None:
        """Build and initialise.

        Args:
            dim: D, of the queries and of what is returned.
            context_dim: of what is looked at.
            heads: of the queries; keys and values have one.
            dim_head: width of a head, even.
            dropout: on the attention weights.
            zero_init: whether the output starts at 0, as a gate that opens with training.
        """
        super().__init__()
        self.heads, self.dim_head, self.dropout, self.zero_init = heads, dim_head, dropout, zero_init
        self.norm = LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim_head, bias=False)
        self.out = nn.Linear(heads * dim_head, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1, weights N(0, 1 / fan_in); the output 0 if it is a gate."""
        nn.init.ones_(self.norm.weight)
        for linear in (self.to_q, self.to_kv, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if self.zero_init:
            nn.init.zeros_(self.out.weight)

    def keys_values(self, context: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What queries look at.

        Args:
            context: (..., S, E).
            positions: (S,) int64, or (..., S).

        Returns:
            Keys and values, each (..., S, K).
        """
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        table = rotary(positions, self.dim_head, xpos_scale_base=None)
        return rotate(keys, table.k_cos, table.k_sin), values

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Look, without the residual.

        Args:
            x: (G, N, D).
            positions: (N,) int64, or (G, N).
            keys: (G, S, K) from `keys_values`.
            values: (G, S, K).
            mask: (G, S) bool, true at what exists.

        Returns:
            (G, N, D); 0 for each row of the mask that is all false.
        """
        table = rotary(positions, self.dim_head, xpos_scale_base=None)
        q = rotate(rearrange(self.to_q(self.norm(x)), "g n (h k) -> g n h k", h=self.heads), table.q_cos, table.q_sin)
        # With one key head, the heads of a query are so many more queries: nothing need be repeated or expanded.
        q, keys, values = rearrange(q, "g n h k -> g 1 (n h) k"), keys.unsqueeze(1), values.unsqueeze(1)
        seen = mask.any(dim=-1)
        # A softmax over nothing would be NaN: who sees nothing looks at everything, and what it finds is dropped.
        allowed = (mask | ~seen[:, None])[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed, dropout_p=dropout)
        mixed = rearrange(mixed, "g 1 (n h) k -> g n (h k)", h=self.heads)
        read: Tensor = self.out(mixed.masked_fill(~seen[:, None, None], 0))
        return read


class ChunkedCrossAttention(CrossAttention):
    """What a layer of the decoder reads in the neighbours: 0 at first, and for ever where a chunk has none.

    A neighbour is thought of as lying over the chunk that found it: its first tokens over the chunk, its continuation over the
    next one. So position m u + m - 1 + i, the i-th reader of chunk u, is at i + m - 1, neighbour token i' at i', and their
    distance is d(i, i') = i - i' + m - 1, for every neighbour alike (appendix B.1.2).
    """

    def read(self, x_BND: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, chunk_size: int) -> Tensor:
        """Read in whole rows, which begin at position 0.

        Args:
            x_BND: (B, N, D).
            keys: (B, U, S, K), of all neighbours of a chunk, one after the other.
            values: (B, U, S, K).
            mask: (B, U, S) bool.
            chunk_size: M.

        Returns:
            (B, N, D), without the residual.
        """
        rows, chunks = keys.shape[:2]
        queries = reading_positions(x_BND, chunks, chunk_size).flatten(0, 1)
        positions = torch.arange(chunk_size, device=x_BND.device) + chunk_size - 1
        read = self(queries, positions, keys.flatten(0, 1), values.flatten(0, 1), mask.flatten(0, 1))
        return from_reading_positions(rearrange(read, "(b u) m d -> b u m d", b=rows), x_BND.shape[1])

    def neighbor_keys_values(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of neighbours: (..., J, R, E) -> two of (..., J R, K)."""
        keys, values = self.keys_values(encodings, torch.arange(encodings.shape[-2], device=encodings.device))
        return keys.flatten(-3, -2), values.flatten(-3, -2)
