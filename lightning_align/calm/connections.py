"""Which layers are connected, and the cross-attention that connects two of them.

Bansal et al. 2024, arXiv 2401.02412, section 3.1: with H_A the augment's hidden state after layer i and H_B the anchor's after
layer j, what layer j + 1 reads is  H_B + f_cross(f_proj(H_A), H_B).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.palm import rotary, rotate


def even_pairs(num_augment: int, num_anchor: int, num_connections: int) -> list[tuple[int, int]]:
    """The paper's spacing: a gap of N / n in each model, both last layers included.

    Args:
        num_augment: N_A, layers of the augment.
        num_anchor: N_B, layers of the anchor.
        num_connections: n.

    Returns:
        (augment layer, anchor layer), counted from 1: ``even_pairs(12, 4, 4) == [(3, 1), (6, 2), (9, 3), (12, 4)]``.

    Raises:
        ValueError: if a model has fewer layers than that.
    """
    if not 1 <= num_connections <= min(num_augment, num_anchor):
        raise ValueError(
            f"{num_connections} connections between an augment of {num_augment} and an anchor of {num_anchor} layers: expected "
            f"1 to {min(num_augment, num_anchor)}; name the pairs with `connections` to use a layer more than once"
        )
    steps = range(1, num_connections + 1)
    return [(i * num_augment // num_connections, i * num_anchor // num_connections) for i in steps]


def check_pairs(pairs: Sequence[Sequence[int]], num_augment: int, num_anchor: int) -> list[tuple[int, int]]:
    """Check explicit pairs.

    Raises:
        ValueError: naming a pair that is out of range, is no pair, or is given twice.
    """
    checked: list[tuple[int, int]] = []
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"connection {list(pair)}: expected a pair [augment layer, anchor layer], counted from 1")
        augment, anchor = pair
        for what, layer, last in (("augment", augment, num_augment), ("anchor", anchor, num_anchor)):
            if not 1 <= layer <= last:
                raise ValueError(f"connection {list(pair)}: {what} layer {layer} is out of range, it has layers 1 to {last}")
        if (augment, anchor) in checked:
            raise ValueError(f"connection {list(pair)} is given twice: leave one out")
        checked.append((augment, anchor))
    if not checked:
        raise ValueError("connections is empty: give at least one pair [augment layer, anchor layer]")
    return checked


@dataclass
class ConnectionConfig:
    """What a connection is made of.

    Args:
        heads: of the cross-attention.
        dim_head: width of a head; by default the anchor's width over `heads`.
        project: whether the augment's hidden state is first projected to the anchor's width, as in the paper.
        norm: whether both hidden states are normalised (RMSNorm) before they meet.
        gate: whether each head is gated by the anchor's hidden state.
        rotary: whether the attention knows the distance between two positions, which the paper does not say; positions of a
            separate prompt have none.
    """

    heads: int = 8
    dim_head: int | None = None
    project: bool = True
    norm: bool = True
    gate: bool = False
    rotary: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if self.heads < 1 or (self.dim_head is not None and self.dim_head < 1):
            raise ValueError(f"connection: heads is {self.heads} and dim_head {self.dim_head}; both must be at least 1")


class Visible(NamedTuple):
    """Who may see whom: without a mask every position, or, if causal, those up to its own column."""

    mask: Tensor | None
    """(B, 1, N, M) bool."""
    causal: bool = False
    blind: Tensor | None = None
    """(B, N, 1) bool, true at positions that see nothing; None where there are none."""


def visible_where(mask: Tensor) -> Visible:
    """Visibility by a mask (B, N, M) or (B, 1, M) that may leave positions without anything to see."""
    return Visible(mask.unsqueeze(1), blind=~mask.any(dim=-1, keepdim=True))


class Connection(nn.Module):
    """Cross-attention from one layer of the anchor to one of an augment; its output starts at exactly 0."""

    def __init__(self, dim: int, dim_augment: int, config: ConnectionConfig, *, rotates: bool = True) -> None:
        """Build and initialise.

        Args:
            dim: D, the anchor's width.
            dim_augment: A, the augment's width.
            config: what it is made of.
            rotates: whether the two models' positions can be compared at all.

        Raises:
            ValueError: if the heads do not divide the width, or a head of odd width is to rotate.
        """
        super().__init__()
        heads, dim_head = config.heads, config.dim_head or dim // config.heads
        if config.dim_head is None and dim % heads:
            raise ValueError(f"connection: {heads} heads do not divide the anchor's width {dim}: give `dim_head` as well")
        self.rotary = config.rotary and rotates
        if self.rotary and dim_head % 2:
            raise ValueError(f"connection: dim_head is {dim_head}; rotary positions need an even one, or `rotary: false`")
        self.heads, self.dim_head = heads, dim_head
        inner, width = heads * dim_head, dim if config.project else dim_augment
        self.norm = nn.RMSNorm(dim, eps=1e-6) if config.norm else nn.Identity()
        self.norm_augment = nn.RMSNorm(dim_augment, eps=1e-6) if config.norm else nn.Identity()
        self.proj = nn.Linear(dim_augment, dim, bias=False) if config.project else nn.Identity()
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.gate = nn.Linear(dim, heads) if config.gate else None
        if self.rotary:
            # Without them the score of two positions could not depend on their distance alone, whatever they hold.
            self.q_bias = nn.Parameter(torch.empty(heads, dim_head))
            self.k_bias = nn.Parameter(torch.empty(heads, dim_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, 1/fan_in), the output 0, gates open."""
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
        """What the anchor attends to.

        Args:
            states: (B, M, A) hidden states of the augment.
            positions: (M,) or (B, M) int64.

        Returns:
            Keys and values, each (B, H, M, K).
        """
        k, v = rearrange(self.to_kv(self.proj(self.norm_augment(states))), "b m (t h k) -> t b m h k", t=2, h=self.heads)
        if self.rotary:
            k = self._rotate(k + self.k_bias, positions)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, hidden: Tensor, k: Tensor, v: Tensor, positions: Tensor, visible: Visible) -> Tensor:
        """What is added to the anchor's stream, (B, N, D).

        Args:
            hidden: (B, N, D) of the anchor.
            k: (B, H, M, K) from `keys_values`.
            v: the same.
            positions: (N,) or (B, N) int64.
            visible: who may see whom.
        """
        normed, q = self._queries(hidden, positions)
        k, v = k.to(q.dtype), v.to(q.dtype)
        mask, blind = visible.mask, visible.blind
        if mask is not None and blind is not None:
            # A softmax over nothing would be NaN: who sees nothing is let see all, and what it saw is thrown away.
            mask = mask | blind.unsqueeze(1)  # (B, 1, N or 1, M)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=visible.causal and mask is None)
        mixed = rearrange(mixed, "b h n k -> b n h k")
        if self.gate is not None:
            mixed = mixed * self.gate(normed).sigmoid().unsqueeze(-1)
        out: Tensor = self.to_out(mixed.flatten(-2))
        return out if blind is None else out.masked_fill(blind, 0.0)

    @torch.no_grad()
    def attention(self, hidden: Tensor, k: Tensor, positions: Tensor, visible: Visible) -> Tensor:
        """The attention weights (B, H, N, M), to look at; rows that see nothing are 0."""
        _, q = self._queries(hidden, positions)
        scores = q @ k.to(q.dtype).transpose(-1, -2) / self.dim_head**0.5
        if visible.mask is not None:
            scores = scores.masked_fill(~visible.mask, -torch.inf)
        elif visible.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), -torch.inf)
        weights: Tensor = scores.float().softmax(dim=-1).nan_to_num()
        return weights

    def _queries(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(hidden)
        q = rearrange(self.to_q(normed), "b n (h k) -> b n h k", h=self.heads)
        if self.rotary:
            q = self._rotate(q + self.q_bias, positions)
        return normed, q.transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        table = rotary(positions, self.dim_head, xpos_scale_base=None)
        return rotate(x, table.q_cos, table.q_sin)
