"""Batches of pairs as one batch of rows, and what steps return for callbacks and files."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_align.scoring.ratios import Ratios, pair_metrics
from lightning_align.types import LogProbs, PreferenceBatch, TokenBatch


def concatenate(batch: PreferenceBatch) -> TokenBatch:
    """Concatenate chosen rows and rejected rows, padded on the right to one width: (2B, N)."""
    chosen, rejected = batch["chosen"], batch["rejected"]
    width = max(chosen["tokens"].shape[1], rejected["tokens"].shape[1])

    def join(name: str) -> Tensor:
        sides = cast(tuple[dict[str, Tensor], ...], (chosen, rejected))
        return torch.cat([F.pad(side[name], (0, width - side[name].shape[1])) for side in sides])

    both: TokenBatch = {"tokens": join("tokens"), "mask": join("mask"), "targets": join("targets")}
    if "num_targets" in chosen and "num_targets" in rejected:
        both["num_targets"] = chosen["num_targets"] + rejected["num_targets"]
    if "lengths" in chosen and "lengths" in rejected:
        both["lengths"] = [*chosen["lengths"], *rejected["lengths"]]
    if batch.get("prefixes") is not None:
        both["prefixes"] = batch["prefixes"]
    return both


def detached(policy: LogProbs, ratios: Ratios) -> dict[str, Any]:
    """Return log-probs and log-ratios without their graphs, for callbacks."""
    return {
        "policy": LogProbs(*(part.detach() for part in policy)),
        "ratios": Ratios(*(None if part is None else part.detach() for part in ratios)),  # type: ignore[arg-type]
    }


def scored_rows(batch: PreferenceBatch, policy: LogProbs, ratios: Ratios, *, beta: float) -> list[dict[str, Any]]:
    """Return one dictionary per pair: its row, log-probs, rewards, margin, and lengths in tokens."""
    values = pair_metrics(policy, ratios, beta=beta)
    rows = batch["chosen"].get("rows", torch.arange(len(ratios.chosen)))
    names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins")
    # One copy for all floats and one for all integers: each makes the host wait for a GPU.
    floats = torch.stack([values[name] for name in names]).tolist()
    numbers = torch.stack([rows.to(ratios.chosen.device), ratios.chosen_lengths, ratios.rejected_lengths]).tolist()
    columns = ("row", *(name.replace("/", "_") for name in names), "tokens_chosen", "tokens_rejected")
    return [dict(zip(columns, line, strict=True)) for line in zip(numbers[0], *floats, *numbers[1:], strict=True)]
