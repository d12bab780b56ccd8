"""A connection computed slowly: one position, one head and one key at a time, in float64 and with nothing from the package."""

import math

import torch
from torch import Tensor

from lightning_align.calm.connections import Connection


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * gain


@torch.no_grad()
def slow_connection(connection: Connection, hidden: Tensor, states: Tensor, *, causal: bool) -> Tensor:
    """Compute what a connection without rotation adds to hidden states (B, N, D), from states (B, M, A)."""
    normed, gated = hasattr(connection.norm, "weight"), connection.gate is not None
    heads, width = connection.heads, connection.dim_head
    out = torch.zeros_like(hidden)
    for b in range(len(hidden)):
        for t in range(hidden.shape[1]):
            read = rms(hidden[b, t], connection.norm.weight) if normed else hidden[b, t]  # type: ignore[arg-type]
            query = connection.to_q.weight @ read
            mixed = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                q = query[part]
                if hasattr(connection.q_norm, "weight"):
                    q = rms(q, connection.q_norm.weight)  # type: ignore[arg-type]
                scores, values = [], []
                for j in range(t + 1 if causal else states.shape[1]):
                    state = states[b, j]
                    if normed:
                        state = rms(state, connection.norm_augment.weight)  # type: ignore[arg-type]
                    if hasattr(connection.proj, "weight"):
                        state = connection.proj.weight @ state  # type: ignore[operator]
                    keys, given = (connection.to_kv.weight @ state).chunk(2)
                    k = keys[part]
                    if hasattr(connection.k_norm, "weight"):
                        k = rms(k, connection.k_norm.weight)  # type: ignore[arg-type]
                    scores.append(float(q @ k) / math.sqrt(width))
                    values.append(given[part])
                total = sum(math.exp(score) for score in scores)
                head = sum((math.exp(s) / total * v for s, v in zip(scores, values, strict=True)), torch.zeros(width).double())
                if gated:
                    head = head * torch.sigmoid(connection.gate.weight[h] @ read + connection.gate.bias[h])  # type: ignore[union-attr]
                mixed.append(head)
            out[b, t] = connection.to_out.weight @ torch.cat(mixed)
    return out
