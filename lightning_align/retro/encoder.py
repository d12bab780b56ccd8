"""The encoder of neighbors: a small bidirectional transformer that can attend to the chunk that they were retrieved for."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.attention import PaddedAttention, attention_mask
from lightning_align.models.palm import LayerNorm, PaLMBlock, rotary
from lightning_align.retro.attention import CrossAttention


class NeighborEncoder(nn.Module):
    """Encoder of neighbor tokens, with one vector per token (Borgeaud et al. 2021, section 2.3, algorithm 1)."""

    def __init__(
        self,
        dim: int,
        *,
        decoder_dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        ff_mult: int,
        conditioned: bool,
        dropout: float,
    ) -> None:
        """Build the encoder. See `RETRO` for the arguments."""
        super().__init__()
        self.dim_head = dim_head
        self.embedding_norm = LayerNorm(decoder_dim)
        self.embed = nn.Linear(decoder_dim, dim, bias=False)
        self.blocks = nn.ModuleList(
            PaLMBlock(
                dim,
                heads=heads,
                dim_head=dim_head,
                ff_mult=ff_mult,
                qk_rmsnorm=False,
                qk_scale=1.0,
                attn_dropout=dropout,
                ff_dropout=dropout,
            )
            for _ in range(depth)
        )
        self.context_norm = LayerNorm(decoder_dim) if conditioned else None
        self.cross = nn.ModuleList(
            CrossAttention(dim, decoder_dim, heads=heads, dim_head=dim_head, dropout=dropout, zero_init=False)
            for _ in range(depth if conditioned else 0)
        )
        self.norm = LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the gains to 1 and the weights from N(0, 1 / fan_in)."""
        for module in self.modules():
            if isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, tokens: Tensor, mask: Tensor, embedding: Tensor, chunk: Tensor | None) -> Tensor:
        """Encode neighbors.

        Args:
            tokens: (G, J, R) int64 token ids of the neighbors and their continuations.
            mask: (G, J, R) bool, true at real tokens.
            embedding: (V, D) embedding vectors of the vocabulary, shared with the decoder.
            chunk: (G, M, D) hidden states of the decoder for the chunks that the neighbors were retrieved for. Ignored if the
                encoder is not conditioned.

        Returns:
            (G, J, R, E) encodings. The values at masked tokens are undefined.
        """
        neighbors = tokens.shape[1]
        # Normalize the embedding vectors, because the decoder may scale them in any way.
        x = self.embed(self.embedding_norm(F.embedding(tokens.flatten(0, 1), embedding)))
        whole = tokens.device.type == "cpu" and bool(mask.all())
        attend = PaddedAttention(False, None if whole else attention_mask(mask.flatten(0, 1), x.shape[1], causal=False))
        places = torch.arange(x.shape[1], device=x.device)
        table = rotary(places, self.dim_head, xpos_scale_base=None)
        if self.context_norm is None:
            chunk = None
        else:
            assert chunk is not None
            chunk = self.context_norm(chunk)
            seen = torch.ones(chunk.shape[:2], dtype=torch.bool, device=x.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, table, attend)
            if chunk is not None:
                cross = self.cross[layer]
                keys, values = cross.keys_values(chunk, torch.arange(chunk.shape[1], device=x.device))  # type: ignore[operator]
                # All neighbors of a chunk attend to that chunk only, so they can be queries of one long row.
                queries = rearrange(x, "(g j) r e -> g (j r) e", j=neighbors)
                looked = cross(queries, places.repeat(neighbors), keys, values, seen)
                x = x + rearrange(looked, "g (j r) e -> (g j) r e", j=neighbors)
        encoded: Tensor = self.norm(x)
        return rearrange(encoded, "(g j) r e -> g j r e", j=neighbors)
