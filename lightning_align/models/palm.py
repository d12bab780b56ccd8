"""PaLM: a transformer with parallel attention and feed-forward layers, multi-query attention and SwiGLU.

Chowdhery et al. 2022, arXiv 2204.02311, section 2:  y = x + MLP(LN(x)) + Attention(LN(x)).
Rotary positions: Su et al. 2021, arXiv 2104.09864. With decay (xPos): Sun et al. 2022, arXiv 2212.10554.
"""

import math
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align.models.attention import (
    Attend,
    KVCache,
    PackedAttention,
    PaddedAttention,
    attention_dtype,
    attention_mask,
)
from lightning_align.models.documents import document_mask, document_positions
from lightning_align.models.language_model import Head
from lightning_align.models.lora import is_adapted
from lightning_align.models.palm_unpadded import WithoutPadding
from lightning_align.models.parallelize import compile_blocks, uncompiled
from lightning_align.models.static_cache import StepKV
from lightning_align.runtime.kinds import check_kinds, hints_of
from lightning_align.runtime.ranks import local

# xPos scales a query by s^(t/b - c) and a key by the inverse. The center c cancels in the product q.k, so any constant is
# correct, but cached keys and new queries must use the same. A positive center halves the range of the factors.
XPOS_CENTER = 2.0
ROTARY_BASE = 10_000.0


class Rotary(NamedTuple):
    """Cosines and sines that rotate (and with xPos scale) queries and keys at given positions, in float32.

    Those of queries are (..., 1, K), those of keys (..., K). The first half of each sine is negated, which saves `rotate` a
    pass over its input.
    """

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor


def rotary(positions: Tensor, dim_head: int, *, xpos_scale_base: float | None) -> Rotary:
    """Compute the rotations of given positions, always in float32. At position 8,192 bfloat16 cannot distinguish neighbors.

    The tables depend only on the positions, so no buffer has to be registered in ``forward``, materialized from the meta
    device or moved between devices.

    Args:
        positions: (...) int64 positions.
        dim_head: The head width K, even.
        xpos_scale_base: The base b of xPos, in positions. None gives plain rotary positions.
    """
    half = torch.arange(0, dim_head, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * ROTARY_BASE ** (-half / dim_head)
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    if xpos_scale_base is None:
        return Rotary(cos.unsqueeze(-2), sin.unsqueeze(-2), cos, sin)
    power = positions.float()[..., None] / xpos_scale_base - XPOS_CENTER
    scale = ((half + 0.4 * dim_head) / (1.4 * dim_head)) ** power
    scale = torch.cat((scale, scale), -1)
    return Rotary((cos * scale).unsqueeze(-2), (sin * scale).unsqueeze(-2), cos / scale, sin / scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of one element from each half of the last dimension, in float32. The result has the dtype of ``x``."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalization with a gain and without a bias (PaLM has no biases)."""

    def __init__(self, dim: int) -> None:
        """Set up the layer with gain 1.

        Args:
            dim: The width D, the last dimension of the input.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension: (..., D) -> (..., D)."""
        weight: Tensor = self.weight
        if weight.dtype.itemsize < x.dtype.itemsize:
            weight = weight.to(x.dtype)  # gathered in 16 bits under FSDP2
        return F.layer_norm(x, weight.shape, weight)


class PaLMBlock(nn.Module):
    """One layer: x + Attention(LN(x)) + MLP(LN(x)), with one input projection for both branches."""

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
        """Set up the layer. See `PaLM` for the arguments."""
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
        """Compute the layer with its residual: (..., D) -> (..., D).

        The residual is added out of place, so that hooks can keep the tensors that they receive.

        Args:
            x: The hidden states, padded (B, N, D) or packed (T, D).
            positions: The rotations for the leading dimensions of ``x``.
            attend: The attention for the layout of ``x``.
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


class PaLM(WithoutPadding):
    """The built-in language model.

    It has all optional capabilities of a language model: ``hidden`` and ``head`` (log-probs in chunks), ``packed_hidden`` (no
    padding), ``make_cache`` (decoding with a key-value cache) and ``blocks`` (reading between layers, and cross-attention).
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
        """Build the model and initialize its weights.

        Args:
            num_tokens: The vocabulary size V.
            dim: The model width D.
            depth: The number of layers.
            heads: The number of query heads H. Keys and values have one head.
            dim_head: The width K of a head. Must be even.
            ff_mult: The width of the feed-forward layer divided by `dim`.
            causal: Whether each position attends only to itself and earlier positions. False makes an encoder.
            variant: The initialization and position scheme. `palm_rlhf` follows PaLM-rlhf-pytorch: embeddings with standard
                deviation 0.02, xPos, unscaled logits. `paper` follows the paper: weights N(0, 1/fan_in), embeddings N(0, 1),
                plain rotary positions, logits scaled by 1/sqrt(dim).
            xpos: Whether rotary positions decay with distance. By default true for `palm_rlhf` and false for `paper`. An
                encoder never uses it.
            xpos_scale_base: The distance over which xPos decays, in positions.
            qk_rmsnorm: Whether to normalize queries and keys and to scale their products by `qk_scale`.
            qk_scale: The scale of the products of normalized queries and keys. Without `qk_rmsnorm` the scale is
                dim_head ** -0.5 instead.
            attn_dropout: The dropout probability on the attention weights.
            ff_dropout: The dropout probability inside the feed-forward layer.
            tie_embeddings: Whether the output layer shares the weight of the embedding.
            compile: The backend of `torch.compile` for the layers, such as `inductor`. By default the layers are not compiled.
                Decoding is compiled only on CUDA. Do not use it within RETRO, which reads between layers.

        Raises:
            ValueError: If a size is less than 1, `dim_head` is odd, or `compile` is not a known backend.
        """
        super().__init__()
        # A checkpoint rebuilds the model from these. Compilation is left out because it depends on the machine.
        self.init_args: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_kinds("PaLM", hints_of(PaLM), self.init_args)
        del self.init_args["compile"]
        sizes = {"num_tokens": num_tokens, "dim": dim, "depth": depth, "heads": heads, "ff_mult": ff_mult}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"PaLM: `{name}` must be at least 1, but got {size}.")
        if dim_head < 2 or dim_head % 2:
            raise ValueError(f"PaLM: `dim_head` must be even and at least 2 for rotary positions, but got {dim_head}.")
        self.num_tokens, self.dim, self.dim_head, self.causal, self.variant = num_tokens, dim, dim_head, causal, variant
        if xpos is None:
            xpos = variant == "palm_rlhf"
        # The decay assumes that keys come before queries. Without causality it would amplify the keys after a query.
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
        """Compile the layers again, because copies and unpickled models lose their compilation."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        if self.compile_backend is not None:
            compile_blocks(self.blocks, self.compile_backend)

    def reset_parameters(self) -> None:
        """Initialize all parameters according to the variant.

        Call this after ``to_empty`` if the model was built on the meta device.
        """
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
        """The output layer, or None if it has active adapters that are not merged.

        This is a property rather than a module. As a module, a tied weight would have a second name. The two names would refer
        to different tensors after ``to_empty``, and every checkpoint would contain the weight twice.
        """
        if is_adapted(self.to_logits):
            return None
        return Head(local(self.token_emb.weight if self.to_logits is None else self.to_logits.weight), None)

    def make_cache(self, batch: int, length: int) -> KVCache:
        """Allocate a key-value cache.

        Args:
            batch: The number of rows B.
            length: The number of columns S.
        """
        weight = self.token_emb.weight

        def allocate() -> list[Tensor]:
            # Not weight.new_empty, which would return a sharded tensor for a sharded weight.
            shape = (batch, length, self.dim_head)
            return [torch.empty(shape, dtype=attention_dtype(weight), device=weight.device) for _ in self.blocks]

        return KVCache(allocate(), allocate())

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | StepKV | None = None,
        documents: Tensor | None = None,
        extra_embed: Tensor | None = None,
    ) -> Tensor:
        """Compute the final hidden states. `head` turns them into logits.

        Args:
            tokens: (B, N) int64 token ids. With a cache, these are the tokens that follow the cached ones.
            mask: (B, M) bool, true at real tokens, or (B, N, M) bool, true where a query may attend to a key. M is the number
                of cached and new columns. (B, 1, N, M) is used as it is, without adding causality. None if there is no padding,
                or if the model is causal and padded on the right.
            positions: (N,) or (B, N) int64 positions. By default they are counted from the first column. This is also correct
                with padding on the left, because attention depends only on distances.
            cache: A cache from `make_cache`. It is extended in place.
            documents: (B, N) int64 numbers of documents, as in a `TokenBatch`. Each document is computed as if it were a row of
                its own. It takes the place of `mask`, `positions` and `cache`.
            extra_embed: (B, N, D) vectors that are added to the token embeddings, as in palm-rlhf-pytorch.

        Returns:
            (B, N, D) hidden states.
        """
        if documents is not None:
            if self.causal and tokens.device.type == "cpu" and self.compile_backend is None and extra_embed is None:
                return self._document_hidden(tokens, documents)
            mask, positions = document_mask(documents), document_positions(documents)
        past, new = (0 if cache is None else cache.length), tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + new, device=tokens.device)
        allowed = None
        if mask is not None:
            allowed = mask if mask.ndim == 4 else attention_mask(mask, new, causal=self.causal)
        elif past and new > 1:
            allowed = attention_mask(
                torch.ones(tokens.shape[0], past + new, dtype=torch.bool, device=tokens.device), new, causal=True
            )
        padded = PaddedAttention(self.causal, allowed)
        table = rotary(positions, self.dim_head, xpos_scale_base=self.xpos_scale_base)
        x = self.token_emb(tokens) if extra_embed is None else self.token_emb(tokens) + extra_embed
        with nullcontext() if cache is None else uncompiled(self):
            for layer, block in enumerate(self.blocks):
                x = block(x, table, padded if cache is None else cache.attend(layer, allowed))
        if cache is not None:
            cache.advance(new)
        return self._finish(x)

    def packed_hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute the final hidden states of the real tokens of right-padded rows, without computing the padding.

        Args:
            tokens: (B, N) int64 token ids.
            mask: (B, N) bool, true at real tokens, which come before the padding.

        Returns:
            (T, D) hidden states, row by row.

        Raises:
            ValueError: If the model is not causal. Its padding would need a mask.
        """
        if not self.causal:
            raise ValueError("PaLM.packed_hidden needs `causal=True`, but got False. Use `hidden(tokens, mask=mask)` instead.")
        where = mask.flatten().nonzero().squeeze(-1)
        attend = PackedAttention(where, [(tokens.shape[0], tokens.shape[1])])
        return self._packed(tokens.flatten().index_select(0, where), where % tokens.shape[1], attend)

    def _packed(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        table = rotary(positions, self.dim_head, xpos_scale_base=self.xpos_scale_base)
        x = self.token_emb(tokens)
        for block in self.blocks:
            x = block(x, table, attend)
        return self._finish(x)

    def _finish(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        # The logit scale of the paper is applied to the hidden state, so that "logits = linear(hidden, head)" holds for both
        # variants.
        return x * self.dim**-0.5 if self.variant == "paper" else x

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | StepKV | None = None,
        documents: Tensor | None = None,
        extra_embed: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits (B, N, V). See `hidden` for the arguments."""
        options = {"mask": mask, "positions": positions, "documents": documents, "extra_embed": extra_embed}
        hidden = self.hidden(tokens, cache=cache, **options)
        return F.linear(hidden, local(self.token_emb.weight)) if self.to_logits is None else self.to_logits(hidden)
