"""Pictures of what the anchor attends to in its augments."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_align.calm.datamodule import CALMBatch
from lightning_align.calm.model import Trace
from lightning_align.calm.spec import AugmentInput, Spot
from lightning_align.training.panels import show_picture
from lightning_align.training.pictures import heatmap
from lightning_align.training.tensorboard import Charts

CHARTS: Charts = {
    "norm that connections add, relative to the stream": ("train/contribution/*",),
    "bits per byte of validation": ("val/bits_per_byte",),
}
"""The charts of the method in TensorBoard."""
MOST = 64
"""The largest number of tokens of a side that is shown. Labels of more could not be read."""


def first_row(batch: CALMBatch) -> CALMBatch:
    """Return the first row of a batch, without what the loader counted in the whole batch."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:1]
        if isinstance(value, AugmentInput):
            return AugmentInput(*(cut(part) for part in value))
        return [cut(part) for part in value] if isinstance(value, (list, tuple)) else value

    found: Any = {name: cut(value) for name, value in batch.items() if name not in ("num_targets", "lengths")}
    return found  # type: ignore[no-any-return]


def show_attention(
    loggers: Sequence[Any],
    traces: Sequence[Trace],
    spots: Sequence[Spot],
    batch: CALMBatch,
    inputs: Sequence[AugmentInput | None],
    *,
    tokenizers: Sequence[Any],
    step: int,
) -> None:
    """Give each logger a picture per connection, with the tokens of both models.

    Args:
        loggers: The loggers.
        traces: The recorded connections of a batch of one row.
        spots: The layers that each connection connects.
        batch: The batch.
        inputs: The input of each augment. None for one that reads the anchor's tokens.
        tokenizers: The tokenizer of the anchor, then that of each augment. None shows ids.
        step: The optimizer step.
    """
    own = batch["mask"][0]
    rows = _labels(batch["tokens"][0][own][:MOST], tokenizers[0])
    by_name = {spot.name: spot for spot in spots}
    for trace in traces:
        spot = by_name[trace.name]
        given = inputs[spot.augment]
        tokens, mask = (batch["tokens"][0], own) if given is None else (given.tokens[0], None)
        if given is not None:
            mask = torch.ones(tokens.shape[0], dtype=torch.bool, device=own.device) if given.mask is None else given.mask[0]
        assert trace.weights is not None
        assert mask is not None
        weights = trace.weights[0].amax(dim=0)  # the maximum over heads
        weights = weights[own][:, mask][:MOST, :MOST]
        columns = _labels(tokens[mask][:MOST], None if given is not None and tokens.ndim > 1 else tokenizers[1 + spot.augment])
        cut = f", the first {MOST} tokens" if max(int(own.sum()), int(mask.sum())) > MOST else ""
        picture = heatmap(
            weights.float().cpu().numpy(),
            rows=rows,
            columns=columns,
            row_axis="tokens of the anchor",
            column_axis=f"tokens of augment {spot.augment}",
            title=f"augment {spot.augment}, layer {spot.augment_layer} to anchor, layer {spot.anchor_layer}: "
            f"largest weight of the heads{cut}",
        )
        show_picture(loggers, f"val/attention/{trace.name}", picture, step=step)


def _labels(tokens: Tensor, tokenizer: Any) -> list[str]:
    ids = tokens.reshape(len(tokens), -1)[:, 0].tolist()
    if tokenizer is None:
        return [str(number) for number in ids]
    names = {getattr(tokenizer, f"{name}_id", None): f"<{name}>" for name in ("pad", "eos", "bos")}
    return [names.get(number) or tokenizer.decode([number]) or f"<{number}>" for number in ids]
