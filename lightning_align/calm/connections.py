"""The pairs of connected layers, and the cross-attention that connects the two layers of a pair.

Bansal et al. 2024, arXiv 2401.02412, section 3.1: let H_A be the augment's hidden state after layer i, and H_B the anchor's
hidden state after layer j. Layer j + 1 of the anchor then reads  H_B + f_cross(f_proj(H_A), H_B).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.attention import Attend
from lightning_align.models.palm import rotary, rotate
from lightning_align.models.sdpa import dot_product_attention


def even_pairs(num_augment: int, num_anchor: int, num_connections: int) -> list[tuple[int, int]]:
    """Compute the paper's spacing of connections: a gap of N / n layers in each model, including both last layers.

    Args:
        num_augment: N_A, the number of layers of the augment.
        num_anchor: N_B, the number of layers of the anchor.
        num_connections: n, the number of connections.

    Returns:
        Pairs (augment layer, anchor layer), counted from 1: ``even_pairs(12, 4, 4) == [(3, 1), (6, 2), (9, 3), (12, 4)]``.

    Raises:
        ValueError: If a model has fewer than ``num_connections`` layers, or ``num_connections`` is less than 1.
    """
    if not 1 <= num_connections <= min(num_augment, num_anchor):
        raise ValueError(
            f"`num_connections` must be between 1 and {min(num_augment, num_anchor)}, but got {num_connections}. The augment "
            f"has {num_augment} layers and the anchor {num_anchor}. To use a layer twice, list the pairs in `connections`."
        )
    steps = range(1, num_connections + 1)
    return [(i * num_augment // num_connections, i * num_anchor // num_connections) for i in steps]


def check_pairs(pairs: Sequence[Sequence[int]], num_augment: int, num_anchor: int) -> list[tuple[int, int]]:
    """Check pairs of layers that the user listed.

    Args:
        pairs: Pairs [augment layer, anchor layer], counted from 1.
        num_augment: The number of layers of the augment.
        num_anchor: The number of layers of the anchor.

    Returns:
        The pairs as tuples.

    Raises:
        ValueError: If there are no pairs, or an entry is not a pair, is out of range, or is given twice.
    """
    checked: list[tuple[int, int]] = []
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(layer, int) for layer in pair):
            raise ValueError(
                f"`connections` must contain pairs [augment layer, anchor layer], counted from 1, but got {list(pair)}."
            )
        augment, anchor = pair
        for name, layer, last in (("augment", augment, num_augment), ("anchor", anchor, num_anchor)):
            if not 1 <= layer <= last:
                raise ValueError(f"connection {list(pair)}: the {name} layer must be between 1 and {last}, but got {layer}.")
        if (augment, anchor) in checked:
            raise ValueError(f"`connections` contains {list(pair)} twice. Remove the duplicate.")
        checked.append((augment, anchor))
    if not checked:
        raise ValueError("`connections` is empty. Pass at least one pair [augment layer, anchor layer].")
    return checked


@dataclass
class ConnectionConfig:
    """The architecture of the connections.

    Args:
        heads: The number of heads of the cross-attention.
        dim_head: The width of a head. Default is the anchor's width divided by `heads`.
        project: Whether to project the augment's hidden state to the anchor's width first, as the paper does.
        norm: Whether to apply RMSNorm to both hidden states before the attention.
        gate: Whether to scale each head's output by a sigmoid gate that is computed from the anchor's hidden state.
        rotary: Whether to apply rotary position embeddings, so that the attention knows the distance between two positions.
            The paper does not specify this. It has no effect for an augment that reads a prefix.
        qk_norm: Whether to apply RMSNorm with a learned gain to the queries and keys of each head, which bounds the scores.
        attn_dropout: The dropout probability of the attention weights, in training only.
    """

    heads: int = 8
    dim_head: int | None = None
    project: bool = True
    norm: bool = True
    gate: bool = False
    rotary: bool = True
    qk_norm: bool = False
    attn_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.heads < 1 or (self.dim_head is not None and self.dim_head < 1):
            raise ValueError(
                "connection: `heads` and `dim_head` must be at least 1, "
                f"but got heads={self.heads} and dim_head={self.dim_head}."
            )
        if not 0 <= self.attn_dropout < 1:
            raise ValueError(f"connection: `attn_dropout` must be at least 0 and below 1, but got {self.attn_dropout}.")


class Visible(NamedTuple):
    """Which positions of the augment each position of the anchor may see."""

    mask: Tensor | None
    """(B, 1, N, M) bool, true at visible pairs. None means all pairs, or the lower triangle if `causal` is true."""
    causal: bool = False
    """Whether a position sees only columns up to its own. It applies only without a mask."""
    attend: Attend | None = None
    """The attention of rows without padding, (1, T, ...). It takes the place of `mask` and `causal`."""
    blind: Tensor | None = None
    """(B, N, 1) bool, true at positions of the anchor that see nothing. None if there are no such positions."""


def visible_where(mask: Tensor) -> Visible:
    """Build the visibility from a mask (B, N, M) or (B, 1, M), in which some positions may see nothing."""
    return Visible(mask.unsqueeze(1), blind=~mask.any(dim=-1, keepdim=True))


class Connection(nn.Module):
    """Cross-attention from a layer of the anchor to a layer of an augment. Before training, its output is exactly 0."""

    def __init__(self, dim: int, dim_augment: int, config: ConnectionConfig, *, rotates: bool = True) -> None:
        """Build and initialize the connection.

        Args:
            dim: D, the anchor's width.
            dim_augment: A, the augment's width.
            config: The architecture of the connection.
            rotates: Whether positions of the two models can be compared. If False, rotary embeddings are off.

        Raises:
            ValueError: If the number of heads does not divide the width, or rotary embeddings get a head of odd width.
        """
        super().__init__()
        heads, dim_head = config.heads, config.dim_head or dim // config.heads
        if config.dim_head is None and dim % heads:
            raise ValueError(
                f"connection: `heads` must divide the anchor's width {dim}, but got {heads}. Change it, or also set `dim_head`."
            )
        self.rotary = config.rotary and rotates
        if self.rotary and dim_head % 2:
            raise ValueError(
                f"connection: `dim_head` must be even for rotary embeddings, but got {dim_head}. "
                "Change it, or set `rotary: false`."
            )
        self.heads, self.dim_head, self.attn_dropout = heads, dim_head, config.attn_dropout
        self.dim_augment = dim_augment
        inner, width = heads * dim_head, dim if config.project else dim_augment
        self.norm = nn.RMSNorm(dim, eps=1e-6) if config.norm else nn.Identity()
        self.norm_augment = nn.RMSNorm(dim_augment, eps=1e-6) if config.norm else nn.Identity()
        self.proj = nn.Linear(dim_augment, dim, bias=False) if config.project else nn.Identity()
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.gate = nn.Linear(dim, heads) if config.gate else None
        self.q_norm = nn.RMSNorm(dim_head, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim_head, eps=1e-6) if config.qk_norm else nn.Identity()
        if self.rotary:
            # Without these biases, no part of a score could depend on the distance alone, independent of the hidden states.
            self.q_bias = nn.Parameter(torch.empty(heads, dim_head))
            self.k_bias = nn.Parameter(torch.empty(heads, dim_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize weights from N(0, 1/fan_in), the output projection to 0, and the gates to open (sigmoid(10))."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.zeros_(self.to_out.weight)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, 10.0)
        if self.rotary:
            nn.init.normal_(self.q_bias)
            nn.init.normal_(self.k_bias)

    def keys_values(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values from the augment's hidden states.

        Args:
            states: (B, M, A) hidden states of the augment.
            positions: (M,) or (B, M) int64, positions of the augment's tokens.

        Returns:
            Keys and values, each (B, H, M, K).
        """
        k, v = rearrange(self.to_kv(self.proj(self.norm_augment(states))), "b m (t h k) -> t b m h k", t=2, h=self.heads)
        k = self.k_norm(k)
        if self.rotary:
            k = self._rotate(k + self.k_bias, positions)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, hidden: Tensor, k: Tensor, v: Tensor, positions: Tensor, visible: Visible) -> Tensor:
        """Compute what the connection adds to the anchor's residual stream.

        Args:
            hidden: (B, N, D) hidden states of the anchor.
            k: (B, H, M, K) keys from `keys_values`.
            v: (B, H, M, K) values from `keys_values`.
            positions: (N,) or (B, N) int64, positions of the anchor's tokens.
            visible: Which keys each position may see.

        Returns:
            (B, N, D), 0 at positions that see nothing.
        """
        normed, q = self._queries(hidden, positions)
        k, v = k.to(q.dtype), v.to(q.dtype)
        mask, blind = visible.mask, visible.blind
        if mask is not None and blind is not None:
            # A softmax over no keys is NaN. Positions that see nothing attend to all keys here, and their output is set to 0.
            mask = mask | blind.unsqueeze(1)  # (B, 1, N or 1, M)
        dropout = self.attn_dropout if self.training else 0.0
        causal = visible.causal and mask is None
        if visible.attend is not None:
            packed = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
            mixed = visible.attend(*packed, scale=self.dim_head**-0.5, dropout=dropout)[None]
        else:
            mixed = dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
            mixed = rearrange(mixed, "b h n k -> b n h k")
        if self.gate is not None:
            mixed = mixed * self._gates(normed).to(mixed.dtype)
        out: Tensor = self.to_out(mixed.flatten(-2))
        return out if blind is None else out.masked_fill(blind, 0.0)

    @torch.no_grad()
    def attention(self, hidden: Tensor, k: Tensor, positions: Tensor, visible: Visible) -> Tensor:
        """Compute the attention weights for display.

        Args:
            hidden: (B, N, D) hidden states of the anchor.
            k: (B, H, M, K) keys from `keys_values`.
            positions: (N,) or (B, N) int64, positions of the anchor's tokens.
            visible: Which keys each position may see.

        Returns:
            (B, H, N, M) float32, 0 for positions that see nothing.
        """
        _, q = self._queries(hidden, positions)
        scores = q @ k.to(q.dtype).transpose(-1, -2) / self.dim_head**0.5
        if visible.mask is not None:
            scores = scores.masked_fill(~visible.mask, -torch.inf)
        elif visible.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), -torch.inf)
        weights: Tensor = scores.float().softmax(dim=-1).nan_to_num()
        return weights

    def _gates(self, normed: Tensor) -> Tensor:
        """Compute the (B, N, H, 1) gates, in at least float32.

        In bfloat16 sigmoid(10) is 1, where the derivative that is computed from it is 0, so an open gate would never move.
        """
        assert self.gate is not None
        dtype = torch.promote_types(normed.dtype, torch.float32)
        with torch.autocast(normed.device.type, enabled=False):
            logits = F.linear(normed.to(dtype), self.gate.weight.to(dtype), self.gate.bias.to(dtype))
        return logits.sigmoid().unsqueeze(-1)

    def _queries(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(hidden)
        q = rearrange(self.to_q(normed), "b n (h k) -> b n h k", h=self.heads)
        q = self.q_norm(q)
        if self.rotary:
            q = self._rotate(q + self.q_bias, positions)
        return normed, q.transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        table = rotary(positions, self.dim_head, xpos_scale_base=None)
        return rotate(x, table.q_cos, table.q_sin)
