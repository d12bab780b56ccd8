"""The check of the first batch: the policy still equals the reference, and the targets are the response tokens."""

import torch
from torch import Tensor, nn

from lightning_align.models.lora import lora_disabled, lora_layers
from lightning_align.runtime.modes import evaluating
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, PreferenceBatch, TokenBatch

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Tolerance of rounding per dtype, in nats per token. Stored log-probs come from batches of other shapes and may differ."""
COARSE = 0.03
"""Tolerance for other dtypes, and for forward passes with fewer bits than float32, in nats per token."""


def differs(ratios: Tensor, counts: Tensor, *, coarse: bool, dtype: torch.dtype) -> Tensor:
    """Return whether policy and reference differ by more than rounding, as a scalar bool tensor.

    Args:
        ratios: (B,) log-ratios of responses, in nats.
        counts: (B,) numbers of tokens of the responses.
        coarse: Whether the forward pass has fewer bits than float32.
        dtype: The dtype of the policy's weights.
    """
    limit = COARSE if coarse else TOLERANCE.get(dtype, COARSE)
    return (ratios.detach().abs() > limit * counts.clamp(min=1)).any()


def batch_faults(batch: PreferenceBatch, *, bos_id: int | None = None) -> list[str]:
    """Find faults in the positions of a batch's targets, and doubled BOS tokens.

    Args:
        batch: B pairs.
        bos_id: The BOS token of the tokenizer. If it is unknown, a token that starts every row twice is taken as BOS.

    Returns:
        A text for each fault, empty for a good batch.
    """
    faults = []
    sides = (batch["chosen"], batch["rejected"])
    if any(bool((side["targets"] & ~side["mask"]).any()) for side in sides):
        faults.append("mask: Padding tokens are targets. The targets are not aligned with the responses.")
    elif all(_last_untrained(side) for side in sides):
        faults.append("mask: The last token of every response is not a target. The targets may be one position too early.")
    elif _first_untrained(*sides):
        faults.append(
            "mask: The first tokens in which chosen and rejected differ are not targets. The targets may be too late."
        )
    starts = torch.cat([side["tokens"][:, :2] for side in sides])
    doubled = starts.shape[1] == 2 and bool((starts == (starts[0, 0] if bos_id is None else bos_id)).all())
    # A single pair is no evidence, because its prompt may start with a doubled letter.
    if doubled and (bos_id is not None or len(starts) > 2):
        faults.append(f"BOS: Every row starts with token {int(starts[0, 0])} twice. Both a template and the tokenizer add it.")
    return faults


def _last_untrained(side: TokenBatch) -> bool:
    last = side["mask"].sum(dim=1, keepdim=True) - 1
    return not bool(side["targets"].gather(1, last.clamp(min=0)).any())


def _first_untrained(chosen: TokenBatch, rejected: TokenBatch) -> bool:
    """Return whether in most pairs the first token in which the two sides differ is not a target."""
    width = min(chosen["tokens"].shape[1], rejected["tokens"].shape[1])
    differ = chosen["tokens"][:, :width] != rejected["tokens"][:, :width]
    differ = differ & chosen["mask"][:, :width] & rejected["mask"][:, :width]
    place = differ.float().argmax(dim=1, keepdim=True)
    trained = chosen["targets"].gather(1, place) & rejected["targets"].gather(1, place)
    comparable = differ.any(dim=1)
    return bool((comparable & ~trained[:, 0]).sum() * 2 > comparable.sum())


@torch.no_grad()
def identity_fault(
    policy: nn.Module, reference: nn.Module | None, batch: TokenBatch, expected: LogProbs, *, coarse: bool
) -> str:
    """Find out why a policy differs from its reference before the first step, with at most two forward passes.

    Args:
        policy: The policy, in training mode.
        reference: The model of the reference, or None if it has no model of its own.
        batch: (2B, N) rows.
        expected: (2B,) log-probs of the batch under the reference.
        coarse: Whether the forward pass has fewer bits than float32.

    Returns:
        A text that names the cause and, where there is one, the remedy.
    """
    dtype = next(policy.parameters()).dtype
    other = None if reference is None else next(reference.parameters()).dtype
    if other is not None and other is not dtype:
        return f"dtype: The policy is in {dtype} and the reference in {other}."

    def same() -> bool:
        found = response_logprobs(policy, batch)
        return not bool(differs(found.sums - expected.sums, found.counts, coarse=coarse, dtype=dtype))

    with evaluating(policy, gradients=True):
        if same():
            return (
                "dropout: In evaluation mode the policy equals the reference. Set `dropout` to false for rewards without noise."
            )
        if lora_layers(policy):
            with lora_disabled(policy):
                if same():
                    return "adapter: Without its adapters the policy equals the reference. The adapters do not start at 0."
    return "reference file: The weights of the reference differ from the initial weights of the policy."
