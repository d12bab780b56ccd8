"""Reading neighbors with copies of a decoder's own attention, which saves learning to read from nothing.

A pretrained decoder can already copy from its context. Its frozen layers encode the neighbors, each as a text of its own, and
each cross-attention starts as a copy of the self-attention of its layer. Yen et al. 2024, arXiv 2402.16617, start their
cross-attention from the self-attention too. Here the encoder is the decoder itself, so that the copies read what the originals
read. A gate per head starts at 0.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lightning_align.models.deferred import CannotDefer, is_deferring
from lightning_align.models.sdpa import dot_product_attention
from lightning_align.retro.attention import ChunkReading
from lightning_align.runtime.modes import evaluating

TOLERANCE = 1e-3
"""The greatest relative difference of a copy from the attention that it copies."""
GATE_SCALE = 10.0
"""What a gate is multiplied by. Adam moves all parameters by about the learning rate, and gates have farther to go."""
Hook = Callable[[nn.Module, tuple[Any, ...]], Any]


class _Enough(Exception):
    """Ends a forward pass whose other layers are not needed."""


class CopiedCrossAttention(ChunkReading):
    """Cross-attention that starts as a copy of the self-attention of a decoder layer, with a gate of 0 per head."""

    def __init__(self, block: nn.Module, place: int, *, cos: Tensor, sin: Tensor, dropout: float) -> None:
        """Copy the attention of a layer.

        Args:
            block: The layer. It has `input_layernorm`, and `self_attn` with `q_proj`, `k_proj`, `v_proj` and `o_proj`.
            place: The index of the layer among those that have cross-attention.
            cos: (P, r) cosines of the rotary positions 0 to P - 1.
            sin: (P, r) sines.
            dropout: The dropout probability on the attention weights.
        """
        super().__init__()
        source: Any = block.self_attn
        norm: Any = block.input_layernorm
        self.place, self.dropout, self.dim_head = place, dropout, int(source.head_dim)
        self.scale = float(getattr(source, "scaling", self.dim_head**-0.5))
        self.norm = _trainable_copy(norm)
        self.to_q, self.to_k, self.to_v = (_trainable_copy(getattr(source, f"{name}_proj")) for name in "qkv")
        self.q_norm, self.k_norm = (
            _trainable_copy(getattr(source, name, None) or nn.Identity()) for name in ("q_norm", "k_norm")
        )
        # Without its bias, because the output is 0 without neighbors.
        weight = source.o_proj.weight
        self.out = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        self.out.load_state_dict({"weight": weight})
        self.heads, self.groups = (getattr(source, f"{name}_proj").out_features // self.dim_head for name in "qk")
        self.key_width = self.groups * self.dim_head
        self.gate = nn.Parameter(torch.zeros(self.heads, device=weight.device, dtype=weight.dtype))
        self.register_buffer("cos", cos.clone(), persistent=False)
        self.register_buffer("sin", sin.clone(), persistent=False)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate (..., S, h, K) by positions (S,) or (..., S)."""
        cos, sin = (self.get_buffer(name)[positions].unsqueeze(-2).to(x.dtype) for name in ("cos", "sin"))
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, rest), dim=-1)

    def neighbor_keys_values(self, encodings: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of neighbors.

        Args:
            encodings: (..., J, R, C D) states of the neighbors at the input of each layer with cross-attention.

        Returns:
            Keys and values, each (..., J R, G K).
        """
        width: int = self.out.out_features
        x = self.norm(encodings[..., self.place * width : (self.place + 1) * width])
        keys = self.k_norm(self.to_k(x).unflatten(-1, (self.groups, self.dim_head)))
        keys = self._rotate(keys, torch.arange(x.shape[-2], device=x.device))
        return keys.flatten(-2).flatten(-3, -2), self.to_v(x).flatten(-3, -2)

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend to the neighbors. See `CrossAttention`.

        Args:
            x: (B, N, D) inputs of the queries.
            positions: (N,) or (B, N) int64 positions of the queries.
            keys: (B, S, G K) keys from `neighbor_keys_values`.
            values: (B, S, G K) values.
            mask: (B, S) bool, true at real tokens.

        Returns:
            (B, N, D) outputs. They are 0 for each row of the mask that is all false.
        """
        mixed = self.mix(x, positions, keys, values, mask) * (GATE_SCALE * self.gate)[:, None]
        read: Tensor = self.out(mixed.flatten(-2))
        return read

    def mix(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Return the mean values that each head reads, (B, N, H, K). They are 0 for rows without neighbors."""
        queries = self.q_norm(self.to_q(self.norm(x)).unflatten(-1, (self.heads, self.dim_head)))
        # The heads of queries that share a head of keys are treated as more queries. This avoids repeating the keys.
        queries = rearrange(self._rotate(queries, positions), "b n (g h) k -> b g (n h) k", g=self.groups)
        keys, values = (rearrange(part, "b s (g k) -> b g s k", g=self.groups) for part in (keys, values))
        seen = mask.any(dim=-1)
        allowed = (mask | ~seen[:, None])[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = dot_product_attention(queries, keys, values, attn_mask=allowed, dropout_p=dropout, scale=self.scale)
        mixed = rearrange(mixed, "b g (n h) k -> b n (g h) k", n=x.shape[1])
        return mixed.masked_fill(~seen[:, None, None, None], 0)


def _trainable_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(True)


@contextmanager
def _hooks(modules: Sequence[nn.Module], hook: Callable[[int], Hook]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook(place)) for place, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_inputs(decoder: Any, layers: Sequence[nn.Module], tokens: Tensor) -> Tensor:
    """Return the input of some layers. The forward pass ends at the last of them.

    Args:
        decoder: The language model.
        layers: C of its layers, in ascending order.
        tokens: (B, N) int64 token ids. Padding, if any, is on the right.

    Returns:
        (B, N, C D) inputs, one layer after the other, without gradients.
    """
    found: list[Tensor] = []

    def keep(place: int) -> Hook:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            found.append(inputs[0])
            if place + 1 == len(layers):
                raise _Enough

        return hook

    with torch.no_grad(), _hooks(layers, keep):
        try:
            decoder.hidden(tokens)
        except _Enough:
            pass
    return torch.cat([states.view(*tokens.shape, -1) for states in found], dim=-1)


def copy_attention(decoder: Any, layers: Sequence[nn.Module], length: int, *, dropout: float) -> nn.ModuleList:
    """Copy the attention of some layers, and check each copy against its original.

    Args:
        decoder: A `PretrainedLM`.
        layers: The layers.
        length: The number of positions that the copies know.
        dropout: The dropout probability on the attention weights of the copies.

    Returns:
        A `CopiedCrossAttention` for each layer.

    Raises:
        ValueError: If the attention has other parts than those that are copied.
        CannotDefer: If the weights of the decoder are not there yet.
    """
    if is_deferring():
        raise CannotDefer("the cross-attention starts from weights of the decoder")
    name = type(getattr(decoder, "model", decoder)).__name__
    needed = ("q_proj", "k_proj", "v_proj", "o_proj")
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        missing = [part for part in needed if not isinstance(getattr(attention, part, None), nn.Linear)]
        missing += [] if isinstance(getattr(layer, "input_layernorm", None), nn.Module) else ["input_layernorm"]
        if missing:
            raise ValueError(
                f"RETRO: `reuse_decoder` cannot copy the attention of {name}, whose layers have no {', '.join(missing)}. It "
                "needs a PretrainedLM with rotary positions, such as Llama, Mistral, Qwen or SmolLM. Use reuse_decoder=False."
            )
    device = decoder.head.weight.device
    tokens = torch.arange(length, device=device)[None] * 7919 % decoder.head.weight.shape[0]
    inputs: list[Tensor] = []
    seen: list[tuple[Any, Tensor]] = []

    def keep(_: int) -> Hook:
        return lambda _, found: inputs.append(found[0])

    def look(_: nn.Module, __: Any, keywords: dict[str, Any], output: Any) -> None:
        seen.append((keywords.get("position_embeddings"), output[0] if isinstance(output, tuple) else output))

    attentions: list[Any] = [layer.self_attn for layer in layers]
    handles = [attention.register_forward_hook(look, with_kwargs=True) for attention in attentions]
    try:
        with torch.no_grad(), evaluating(decoder), _hooks(layers, keep):
            decoder.hidden(tokens)
    finally:
        for handle in handles:
            handle.remove()
    copies = nn.ModuleList()
    for place, (layer, x, (positions, output)) in enumerate(zip(layers, inputs, seen, strict=True)):
        if not isinstance(positions, tuple):
            raise ValueError(
                f"RETRO: `reuse_decoder` needs a decoder with rotary positions, and {name} has others. Use reuse_decoder=False."
            )
        cos, sin = (part.reshape(length, -1) for part in positions)
        copied = CopiedCrossAttention(layer, place, cos=cos, sin=sin, dropout=dropout)
        check_copy(copied, x, output, attentions[place].o_proj.bias, name)
        copies.append(copied)
    return copies


@torch.no_grad()
def check_copy(copied: CopiedCrossAttention, x: Tensor, output: Tensor, bias: Tensor | None, name: str) -> None:
    """Raise if a copy computes other numbers than its original.

    The last position of a text sees all of it, as a query sees all of a neighbor. So the copy, reading the text itself from its
    last position, must give what the original gave there.

    Args:
        copied: The copy.
        x: (1, N, D) inputs of the layer.
        output: (1, N, D) outputs of its attention.
        bias: (D,) bias of the output projection, which the copy leaves out.
        name: The name of the model, for the message.

    Raises:
        ValueError: If they differ.
    """
    was, last = copied.training, torch.tensor([x.shape[1] - 1], device=x.device)
    copied.eval()
    encodings = torch.cat((x.new_zeros(*x.shape[:-1], copied.place * x.shape[-1]), x), dim=-1)[:, None]
    keys, values = copied.neighbor_keys_values(encodings)
    mixed = copied.mix(x[:, -1:], last, keys, values, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
    wanted, got = output[:, -1:].double(), copied.out(mixed.flatten(-2)).double()
    copied.train(was)
    wanted = wanted if bias is None else wanted - bias.double()
    apart, size = float((got - wanted).abs().max()), float(wanted.abs().max())
    tolerance = TOLERANCE if x.dtype.itemsize >= 4 else 0.05  # bfloat16 has 8 bits
    if not apart <= tolerance * size:
        raise ValueError(
            f"RETRO: `reuse_decoder` cannot copy the attention of {name}: a copy differs from it by {apart / size:.1e} of its "
            "output. It may have parts that are not copied. Use reuse_decoder=False."
        )
