"""Batches of real rows from any dataset or loader: ids and the length of the prompt."""

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_align.spin.generations import join_rows
from lightning_align.training.loading import count_targets
from lightning_align.types import TokenBatch


def collate_ids(rows: Sequence[tuple[Any, Any]], *, pad_id: int = 0) -> TokenBatch:
    """Collate rows of (ids, prompt length) into a batch for SPINModule.

        DataLoader(dataset, batch_size=8, collate_fn=collate_ids)

    The response of a row is everything after the prompt. It should end with an end-of-sequence id, if the model has one.

    Args:
        rows: For each row, the ids of prompt and response, (N_i,), and the number of ids of the prompt. Negative ids at the
            end of a row are padding and are removed.
        pad_id: The id of the padding in the batch. Default is 0.

    Raises:
        ValueError: If a row is not of this form, or has no prompt or no response.
    """
    ids, lengths = [], []
    for number, row in enumerate(rows):
        if not isinstance(row, (tuple, list)) or len(row) != 2:
            raise ValueError(
                f"Row {number} must be a pair of ids and the length of the prompt, but got a {type(row).__name__}."
            )
        tokens, length = torch.as_tensor(row[0]), int(row[1])
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise ValueError(f"The ids of row {number} must be integers of shape (N,), but have shape {tuple(tokens.shape)}.")
        real = tokens >= 0
        size = int(real.sum())
        if not bool(real[:size].all()):
            raise ValueError(f"The ids of row {number} must not be negative except at its end, where they are padding.")
        if not 1 <= length < size:
            raise ValueError(
                f"The prompt of row {number} must have at least 1 id and leave at least 1 for the response, but it has "
                f"{length} of {size} ids. Give the length of the prompt, or drop such rows."
            )
        ids.append(tokens[:size].long())
        lengths.append(length)
    if not ids:
        raise ValueError("The batch has no rows. Drop empty batches.")
    targets = [torch.arange(len(row), device=row.device) >= n for row, n in zip(ids, lengths, strict=True)]
    return join_rows(ids, targets, pad_id=pad_id)


def real_rows(batch: Any) -> TokenBatch:
    """Return the batch of a loader as a `TokenBatch`.

    Args:
        batch: A `TokenBatch`, or a pair of ids (B, N), with padding below 0, and prompt lengths (B,), as the default collate
            function makes it from rows of (ids, prompt length) with the same number of ids.

    Raises:
        ValueError: If the batch is of neither form.
    """
    if isinstance(batch, dict) and {"tokens", "mask", "targets"} <= batch.keys():
        return batch  # type: ignore[return-value]
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if pair and all(isinstance(part, Tensor) for part in batch) and batch[0].ndim == 2 and batch[1].ndim == 1:
        return collate_ids(list(zip(batch[0], batch[1].tolist(), strict=True)))
    what = f"a dictionary of {', '.join(map(str, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
    raise ValueError(
        f"A batch for SPINModule must have `tokens`, `mask` and `targets`, or be ids (B, N) and prompt lengths (B,), but got "
        f"{what}. Use SPINDataModule, or DataLoader(..., collate_fn=lightning_align.collate_ids)."
    )


def content_number(ids: Tensor) -> int:
    """Return a number of a row that depends only on its ids, to select its random numbers."""
    return int.from_bytes(hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=4).digest(), "big")


def on_host(batch: TokenBatch) -> TokenBatch:
    """Return tokens, mask and targets of a batch on the CPU. A device is waited for once, and not for each of them."""
    names = ("tokens", "mask", "targets")
    if batch["tokens"].device.type == "cpu":
        return batch
    tokens, mask, targets = torch.stack([batch[name].long() for name in names]).cpu()  # type: ignore[literal-required]
    return {"tokens": tokens, "mask": mask.bool(), "targets": targets.bool()}


def sent(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """Return a batch of the CPU on a device, without waiting for it and with the number of its targets."""
    counted = batch if device.type == "cpu" else count_targets(batch)
    return cast(TokenBatch, move_data_to_device(counted, device))


def is_paired(batch: Any) -> bool:
    """Return whether a batch has generated responses already."""
    return isinstance(batch, dict) and "pairs" in batch


def split_rows(batch: TokenBatch) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Split a batch into ids without padding, targets, and prompt lengths of its rows."""
    lengths, prompts = batch["mask"].sum(1).tolist(), batch["targets"].int().argmax(1).tolist()
    answered = batch["targets"].any(1).tolist()
    for number, (prompt, has_targets) in enumerate(zip(prompts, answered, strict=True)):
        if not prompt:
            raise ValueError(
                f"Row {number} of the batch has {'no prompt before its targets' if has_targets else 'no targets'}. A row needs "
                "at least one id of a prompt and one of a response."
            )
    rows = [row[:length] for row, length in zip(batch["tokens"], lengths, strict=True)]
    return rows, [target[:length] for target, length in zip(batch["targets"], lengths, strict=True)], prompts


def tied(pairs: TokenBatch) -> Tensor:
    """Return which generated rows equal their real rows, (B,) bool. Such ties have a gradient of 0."""
    same = [(a == b).all(dim=1) for a, b in (pairs[name].chunk(2) for name in ("tokens", "mask", "targets"))]
    return same[0] & same[1] & same[2]
