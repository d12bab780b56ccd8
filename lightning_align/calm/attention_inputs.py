"""The inputs of the connections' cross-attention: what each augment reads, and which of it each anchor position may see."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.calm.cache import Attended, CALMCache
from lightning_align.calm.connections import Visible, visible_where
from lightning_align.calm.context import check_context, within_context
from lightning_align.calm.own_cache import OwnCache
from lightning_align.calm.reading import Reader
from lightning_align.calm.spec import AugmentInput, Inputs, Spot, check_realigned
from lightning_align.calm.static import StepCALM
from lightning_align.models.attention import attention_mask


def attention_inputs(
    readers: Sequence[Reader],
    spots: Sequence[Spot],
    connections: nn.ModuleList,
    tokens: Tensor,
    *,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: CALMCache | StepCALM | None,
    inputs: Inputs | None,
) -> list[Attended]:
    """Read the augments and compute the keys and values of each connection.

    Args:
        readers: The reader of each augment.
        spots: The layers that each connection connects.
        connections: The connections, in the order of ``spots``.
        tokens: (B, N) token ids of the anchor. With a cache, only the new tokens.
        mask: (B, M) bool over the cached and the new columns, true at real tokens. (B, 1, N, M) is used as it is. None if all
            are real.
        positions: (N,) or (B, N) int64. Default counts from the first column.
        cache: The cache, extended in place, or None.
        inputs: The input of each augment. None if every augment reads the anchor's tokens.

    Returns:
        What each connection attends to, in the order of ``spots``.

    Raises:
        ValueError: If the number of inputs is not the number of augments, or an input does not fit its augment.
    """
    past, new = (0 if cache is None else cache.length), tokens.shape[1]
    if inputs is None:
        inputs = [None] * len(readers)
    if len(inputs) != len(readers):
        raise ValueError(
            f"`inputs` must have one entry per augment, {len(readers)} in all, but got {len(inputs)}. "
            "Use None for an augment that reads the anchor's tokens."
        )
    if positions is None:
        positions = torch.arange(past, past + new, device=tokens.device)
    attended: list[Attended] = []
    for index, (reader, given) in enumerate(zip(readers, inputs, strict=True)):
        own_spots = [i for i, spot in enumerate(spots) if spot.augment == index]
        if isinstance(cache, CALMCache) and reader.prefix and past:
            # The prefix was read in the first step. Only the anchor's positions are new.
            attended += [at._replace(positions=positions) for i in own_spots if (at := cache.attended[i]) is not None]
            continue
        if cache is not None and isinstance(own_cache := cache.augments[index], OwnCache):
            attended += own_cache.read(tokens, mask, past)
            continue
        given, visible = visible_input(index, reader, given, tokens, mask, past, cache)
        if given.states is not None:
            states = dict(zip(reader.depths, given.states, strict=True))
        else:
            aligned = not (reader.prefix or reader.own)
            augment_cache = cache.augments[index] if cache is not None and aligned else None
            states = reader.read(given.tokens, given.mask, positions if aligned else None, augment_cache)
        anchor_positions, augment_positions = positions, positions
        if given.ends is not None and given.anchor_ends is not None:
            anchor_positions, augment_positions = given.anchor_ends, given.ends
        for i in own_spots:
            connection: Any = connections[i]
            k, v = connection.keys_values(states[spots[i].augment_layer], augment_positions)
            if reader.prefix and k.shape[0] == 1:
                k, v = (t.expand(tokens.shape[0], -1, -1, -1) for t in (k, v))
            at = Attended(k, v, anchor_positions, visible)
            attended.append(at if cache is None else cache.update(i, at, past, reader.prefix))
    return attended


def visible_input(
    index: int,
    reader: Reader,
    given: AugmentInput | None,
    tokens: Tensor,
    mask: Tensor | None,
    past: int,
    cache: CALMCache | StepCALM | None,
) -> tuple[AugmentInput, Visible]:
    """Determine what an augment reads now, and which of it each position of the anchor may see.

    Args:
        index: The index of the augment.
        reader: The reader of the augment.
        given: The input of the augment. None if it reads the anchor's tokens.
        tokens: (B, N) token ids of the anchor. With a cache, only the new tokens.
        mask: (B, M) bool over the cached and the new columns, true at real tokens. None if all are real.
        past: The number of cached columns.
        cache: The cache, or None.

    Returns:
        The input that the augment reads, and the visibility.

    Raises:
        ValueError: If the input does not fit the augment, or a required input is missing.
    """
    if given is not None and given.ends is not None:
        check_realigned(index, prefix=reader.prefix, own=reader.own)
    if reader.prefix:
        return _prefix_input(index, reader, given, tokens, mask, cache)
    if reader.own:
        return _realigned_input(index, within_context(index, reader, given))
    states = None if given is None else given.states
    if cache is None and states is None:
        check_context(index, reader, tokens.shape[1])
    if mask is not None:
        visible = Visible(mask if mask.ndim == 4 else attention_mask(mask, tokens.shape[1], causal=True))
    elif cache is None or (past == 0 and tokens.shape[1] > 1):
        visible = Visible(None, causal=True)
    else:
        all_real = torch.ones(tokens.shape[0], past + tokens.shape[1], dtype=torch.bool, device=tokens.device)
        visible = Visible(None if tokens.shape[1] == 1 else attention_mask(all_real, tokens.shape[1], causal=True))
    return AugmentInput(tokens, mask, states=states), visible


def _prefix_input(
    index: int,
    reader: Reader,
    given: AugmentInput | None,
    tokens: Tensor,
    mask: Tensor | None,
    cache: "CALMCache | StepCALM | None",
) -> tuple[AugmentInput, Visible]:
    if given is None and cache is not None:
        given = AugmentInput(tokens, mask)  # in generation, the first columns are the prompt, and the prompt is the prefix
    if given is None:
        raise ValueError(f"`inputs[{index}]` must be an AugmentInput, because augment {index} reads a prefix, but got None.")
    if given.mask is not None and given.states is None and given.tokens.shape[:2] == given.mask.shape:
        # Generation pads on the left. A model with learned positions would count the pads, so they are moved to the right.
        # The order in which a prefix is seen makes no difference, because its keys have no positions.
        order = (~given.mask).int().argsort(dim=1, stable=True)
        rows = torch.arange(len(order), device=order.device)[:, None]
        given = given._replace(tokens=given.tokens[rows, order], mask=given.mask[rows, order])
    given = within_context(index, reader, given) or given
    return given, Visible(None) if given.mask is None else visible_where(given.mask.unsqueeze(1))


def _realigned_input(index: int, given: AugmentInput | None) -> tuple[AugmentInput, Visible]:
    if given is None or given.ends is None or given.anchor_ends is None:
        raise ValueError(
            f"`inputs[{index}]` must be an AugmentInput with `ends` and `anchor_ends`, because augment {index} has its own "
            "tokenizer. Pass its tokens and the characters at which the tokens of both models end."
        )
    allowed = given.ends[:, None, :] <= given.anchor_ends[:, :, None]
    if given.columns is not None:
        allowed = given.columns[:, None, :] <= torch.arange(allowed.shape[1], device=allowed.device)[:, None]
    if given.mask is not None:
        allowed = allowed & given.mask[:, None, :]
    return given, visible_where(allowed)
