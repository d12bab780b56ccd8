"""PaLM: a decoder with parallel attention and feed-forward, multi-query attention and SwiGLU.

Chowdhery et al. 2022, arXiv 2204.02311, section 2:  y = x + MLP(LN(x)) + Attention(LN(x)).
Rotary positions: Su et al. 2021, arXiv 2104.09864; with decay (xPos): Sun et al. 2022, arXiv 2212.10554.
"""

import math
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.models.attention import (
    Attend,
    CachedAttention,
    KVCache,
    PackedAttention,
    PaddedAttention,
    attention_mask,
)
from lightning_align.models.language_model import Head
from lightning_align.models.lora import is_adapted
from lightning_align.models.parallelize import compile_blocks, uncompiled

# xPos scales a query by s^(t/b - c) and a key by its inverse. The centre c cancels in q.k, so any constant is right, but
# it must be one constant for cached keys and new queries alike. A positive one halves the range that the factors span.
XPOS_CENTRE = 2.0
ROTARY_BASE = 10_000.0


class Rotary(NamedTuple):
    """Rotation (and xPos scale) of queries and keys at given positions, each (..., 1, K) or (..., K), float32.

    The first half of a sine is negated, which saves `rotate` a pass.
    """

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor


def rotary(positions: Tensor, dim_head: int, *, xpos_scale_base: float | None) -> Rotary:
    """Tables of rotations, always in float32: at position 8,192 bfloat16 could not tell neighbours apart.

    Computed from the positions alone: there is no buffer to register in ``forward``, to materialise from the meta
    device, or to move.

    Args:
        positions: (...) int64.
        dim_head: K, even.
        xpos_scale_base: base b of xPos; None for plain rotary positions.
    """
    half = torch.arange(0, dim_head, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * ROTARY_BASE ** (-half / dim_head)
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    if xpos_scale_base is None:
        return Rotary(cos.unsqueeze(-2), sin.unsqueeze(-2), cos, sin)
    power = positions.float()[..., None] / xpos_scale_base - XPOS_CENTRE
    scale = ((half + 0.4 * dim_head) / (1.4 * dim_head)) ** power
    scale = torch.cat((scale, scale), -1)
    return Rotary((cos * scale).unsqueeze(-2), (sin * scale).unsqueeze(-2), cos / scale, sin / scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension against each other, in float32, and return to the dtype of ``x``."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation with a gain and no bias (which PaLM leaves out everywhere)."""

    def __init__(self, dim: int) -> None:
        """Gain 1.

        Args:
            dim: D, the last dimension of the input.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.layer_norm(x, self.weight.shape, self.weight)


class PaLMBlock(nn.Module):
    """One layer: x + Attention(LN(x)) + MLP(LN(x)), with one projection into both branches."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        ff_mult: int,
        qk_rmsnorm: bool,
        qk_scale: float,
        attn_dropout: float,
        ff_dropout: float,
    ) -> None:
        """See `PaLM` for the arguments."""
        super().__init__()
        self.heads, self.attn_dropout = heads, attn_dropout
        self.qk_rmsnorm = qk_rmsnorm
        self.scale = qk_scale if qk_rmsnorm else dim_head**-0.5
        self.splits = (heads * dim_head, dim_head, dim_head, ff_mult * dim, ff_mult * dim)
        self.norm = LayerNorm(dim)
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_dropout = nn.Dropout(ff_dropout)
        self.ff_out = nn.Linear(ff_mult * dim, dim, bias=False)
        if qk_rmsnorm:
            self.q_gain = nn.Parameter(torch.ones(dim_head))
            self.k_gain = nn.Parameter(torch.ones(dim_head))

    def forward(self, x: Tensor, positions: Rotary, attend: Attend) -> Tensor:
        """(..., D) -> (..., D), residual included and out of place, so that a hook may keep what it saw.

        Args:
            x: (..., D), padded (B, N, D) or packed (T, D).
            positions: rotations for the leading dimensions of ``x``.
            attend: attention in the layout of ``x``.
        """
        q, k, v, value, gate = self.in_proj(self.norm(x)).split(self.splits, dim=-1)
        q = q.unflatten(-1, (self.heads, -1))
        if self.qk_rmsnorm:
            q, k = F.normalize(q, dim=-1) * self.q_gain, F.normalize(k, dim=-1) * self.k_gain
        q, k = rotate(q, positions.q_cos, positions.q_sin), rotate(k, positions.k_cos, positions.k_sin)
        mixed = attend(q, k, v, scale=self.scale, dropout=self.attn_dropout if self.training else 0.0)
        attention: Tensor = self.attn_out(mixed.flatten(-2))
        feed_forward: Tensor = self.ff_out(self.ff_dropout(F.silu(gate) * value))
        return x + attention + feed_forward


class PaLM(nn.Module):
    """The built-in language model: token ids in, logits out.

    It offers every fast path of the suite: ``hidden`` and ``head`` (log-probs without the logits), ``packed_hidden``
    (no padding), ``make_cache`` (decoding) and ``blocks`` (taps and cross-attention).
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
        causal: bool = True,
        variant: Literal["palm_rlhf", "paper"] = "palm_rlhf",
        xpos: bool | None = None,
        xpos_scale_base: float = 512.0,
        qk_rmsnorm: bool = False,
        qk_scale: float = 8.0,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        tie_embeddings: bool = True,
        compile: str | None = None,
    ) -> None:
        """Build and initialise.

        Args:
            num_tokens: V, the size of the vocabulary.
            dim: D, the width.
            depth: number of layers.
            heads: number of query heads; keys and values have one.
            dim_head: width of a head, even.
            ff_mult: width of the feed-forward layer over the width of the model.
            causal: whether a position sees no later one; false makes an encoder.
            variant: `palm_rlhf` is the initialisation and position scheme of PaLM-rlhf-pytorch (embeddings of standard
                deviation 0.02, xPos, logits as they are); `paper` is that of the paper (weights N(0, 1/fan_in),
                embeddings N(0, 1), plain rotary positions, logits scaled by 1/sqrt(dim)).
            xpos: whether rotary positions decay with distance; by default as the variant has it, and never in an
                encoder.
            xpos_scale_base: distance over which xPos decays.
            qk_rmsnorm: whether queries and keys are normalised, then scaled by `qk_scale`.
            qk_scale: factor on the normalised products; without `qk_rmsnorm` it is dim_head ** -0.5.
            attn_dropout: dropout on the attention weights.
            ff_dropout: dropout inside the feed-forward layer.
            tie_embeddings: whether the output head is the embedding.
            compile: backend of `torch.compile` for the layers, as `inductor`; by default they run as they are, as they always
                do when decoding. Not within CALM or RETRO, which read between layers.

        Raises:
            ValueError: if a size is not positive or `dim_head` is odd.
        """
        super().__init__()
        # What a checkpoint needs to build this model again; whether it is compiled is a matter of the machine.
        self.init_args: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        del self.init_args["compile"]
        sizes = {"num_tokens": num_tokens, "dim": dim, "depth": depth, "heads": heads, "ff_mult": ff_mult}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"PaLM: {name} is {size}; it must be at least 1")
        if dim_head < 2 or dim_head % 2:
            raise ValueError(f"PaLM: dim_head is {dim_head}; rotary positions need an even number of at least 2")
        self.num_tokens, self.dim, self.dim_head, self.causal, self.variant = num_tokens, dim, dim_head, causal, variant
        if xpos is None:
            xpos = variant == "palm_rlhf"
        # Decay is a statement about the past: without causality it would weaken one side and amplify the other.
        self.xpos_scale_base = xpos_scale_base if xpos and causal else None
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.blocks = nn.ModuleList(
            PaLMBlock(
                dim,
                heads=heads,
                dim_head=dim_head,
                ff_mult=ff_mult,
                qk_rmsnorm=qk_rmsnorm,
                qk_scale=qk_scale,
                attn_dropout=attn_dropout,
                ff_dropout=ff_dropout,
            )
            for _ in range(depth)
        )
        self.norm = LayerNorm(dim)
        self.to_logits = None if tie_embeddings else nn.Linear(dim, num_tokens, bias=False)
        self.reset_parameters()
        self.compile_backend = compile
        if compile is not None:
            compile_blocks(self.blocks, compile)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile the layers of a copy, which torch forgets."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it without types
        if self.compile_backend is not None:
            compile_blocks(self.blocks, self.compile_backend)

    def reset_parameters(self) -> None:
        """Initialise every parameter by the variant; call it again after ``to_empty`` if the model was made on meta."""
        paper = self.variant == "paper"
        nn.init.normal_(self.token_emb.weight, std=1.0 if paper else 0.02)
        for module in self.modules():
            if isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, PaLMBlock) and module.qk_rmsnorm:
                nn.init.ones_(module.q_gain)
                nn.init.ones_(module.k_gain)
            elif isinstance(module, nn.Linear):
                if paper:
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                else:
                    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    @property
    def head(self) -> Head | None:
        """Weight and bias such that ``linear(hidden, weight, bias)`` are the logits; None where an adapter adds to them.

        A property and not a module: a second name for the embedding's weight would come apart from it on the way from
        the meta device, and would stand twice in every checkpoint.
        """
        if is_adapted(self.to_logits):
            return None
        return Head(self.token_emb.weight if self.to_logits is None else self.to_logits.weight, None)

    def make_cache(self, batch: int, length: int) -> KVCache:
        """Room for ``length`` columns of ``batch`` rows.

        Args:
            batch: B.
            length: S.
        """
        weight = self.token_emb.weight

        def room() -> list[Tensor]:
            # Not weight.new_empty: of a sharded weight that would be a sharded tensor.
            shape = (batch, length, self.dim_head)
            return [torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in self.blocks]

        return KVCache(room(), room())

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states, of which `head` makes the logits.

        Args:
            tokens: (B, N) int64; with a cache, the tokens after those that it holds.
            mask: (B, M) bool, true at tokens that exist, or (B, N, M) bool, who may see whom; M counts the cached
                columns and the new ones. None if all exist, or if what does not stands on the right of a causal model.
            positions: (N,) or (B, N) int64; by default counted from the first column, which padding on the left does not
                disturb: attention depends on distances alone.
            cache: from `make_cache`; extended in place.

        Returns:
            (B, N, D).
        """
        past, new = (0 if cache is None else cache.length), tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + new, device=tokens.device)
        allowed = None
        if mask is not None:
            allowed = attention_mask(mask, new, causal=self.causal)
        elif past and new > 1:
            allowed = attention_mask(
                torch.ones(tokens.shape[0], past + new, dtype=torch.bool, device=tokens.device), new, causal=True
            )
        elif cache is not None and new > 1:
            allowed = attention_mask(torch.ones_like(tokens, dtype=torch.bool), new, causal=True)
        padded = PaddedAttention(self.causal, allowed)
        table = rotary(positions, self.dim_head, xpos_scale_base=self.xpos_scale_base)
        x = self.token_emb(tokens)
        with nullcontext() if cache is None else uncompiled(self):
            for layer, block in enumerate(self.blocks):
                x = block(x, table, padded if cache is None else CachedAttention(cache, layer, allowed))
        if cache is not None:
            cache.length += new
        return self._finish(x)

    def packed_hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Final hidden states of the real tokens of right-padded rows, without computing anything at the pads.

        Args:
            tokens: (B, N) int64.
            mask: (B, N) bool, true at real tokens, which stand on the left.

        Returns:
            (T, D), row by row.

        Raises:
            ValueError: if the model is not causal: its pads would have to be masked.
        """
        if not self.causal:
            raise ValueError("PaLM.packed_hidden needs causal=True; use hidden(tokens, mask=mask)")
        where = mask.flatten().nonzero().squeeze(-1)
        attend = PackedAttention(where, (tokens.shape[0], tokens.shape[1]))
        table = rotary(where % tokens.shape[1], self.dim_head, xpos_scale_base=self.xpos_scale_base)
        x = self.token_emb(tokens.flatten().index_select(0, where))
        for block in self.blocks:
            x = block(x, table, attend)
        return self._finish(x)

    def _finish(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        # Folding the paper's logit scale into the hidden state keeps "logits = linear(hidden, head)" true for both
        # variants.
        return x * self.dim**-0.5 if self.variant == "paper" else x

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, N, V); the arguments are those of `hidden`."""
        hidden = self.hidden(tokens, mask=mask, positions=positions, cache=cache)
        return F.linear(hidden, self.token_emb.weight) if self.to_logits is None else self.to_logits(hidden)
