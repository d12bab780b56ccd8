"""A composition without padding: the anchor, and augments that read the anchor's tokens, on packed tokens (T, D)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_align.calm.cache import Attended
from lightning_align.calm.connections import Visible
from lightning_align.calm.context import check_context
from lightning_align.calm.reading import Reader
from lightning_align.calm.spec import Inputs, Spot
from lightning_align.models.attention import Attend, attention_dtype
from lightning_align.models.unpadded import Unpadded
from lightning_align.models.varlen import choose_kernel


def longest_unpadded(models: Sequence[nn.Module], readers: Sequence[Reader], device: torch.device) -> float | None:
    """Return the length of the longest row that a composition computes without padding, or None if it does not.

    Args:
        models: The anchor and the augments.
        readers: The reader of each augment. All must read the anchor's tokens: a prefix and the tokens of another tokenizer
            have lengths of their own.
        device: The device of the tokens.
    """
    if any(reader.prefix or reader.own or not reader.taps for reader in readers):
        return None
    limits: list[Any] = [getattr(model, "longest_unpadded", None) for model in models]
    # All are asked, because a model may find it out in a forward pass.
    lengths: list[float | None] = [limit(device) if callable(limit) else None for limit in limits]
    known = [length for length in lengths if length is not None]
    return min(known) if len(known) == len(lengths) else None


def unpadded_inputs(
    readers: Sequence[Reader], spots: Sequence[Spot], connections: nn.ModuleList, unpadded: Unpadded, inputs: Inputs | None
) -> list[Attended]:
    """Read the augments and compute the keys and values of each connection. See `attention_inputs`.

    Args:
        readers: The reader of each augment.
        spots: The layers that each connection connects.
        connections: The connections, in the order of ``spots``.
        unpadded: The tokens of the anchor.
        inputs: The input of each augment, of which only the hidden states (B, N, A) are used. None to compute them.

    Returns:
        What each connection attends to, in the order of ``spots``.
    """
    positions, device = unpadded.positions[None], unpadded.tokens.device
    shared: dict[tuple[Any, ...], Attend] = {}
    attended = []
    for index, reader in enumerate(readers):
        given = None if inputs is None else inputs[index]
        if given is not None and given.states is not None:
            states = {depth: unpadded.select(state)[None] for depth, state in zip(reader.depths, given.states, strict=True)}
        else:
            check_context(index, reader, unpadded.shape[1])
            states = reader.read(unpadded.tokens, None, None, None, unpadded=unpadded)
        for spot, connection in zip(spots, connections, strict=True):
            if spot.augment != index:
                continue
            one: Any = connection
            k, v = one.keys_values(states[spot.augment_layer], positions)
            key = attention_dtype(one.to_q.weight), one.dim_head, one.attn_dropout if one.training else 0.0
            if key not in shared:
                kernel = choose_kernel(device, key[0], key[1], dropout=key[2])
                shared[key] = unpadded.attention(kernel)
            attended.append(Attended(k, v, positions, Visible(None, attend=shared[key])))
    return attended
