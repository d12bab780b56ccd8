"""The check of the first batch: a policy that begins as its reference has rewards of 0, and trains on responses only."""

import torch
from torch import Tensor, nn

from lightning_align.models.lora import lora_disabled, lora_layers
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, PreferenceBatch, TokenBatch

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Nats a token that rounding may make; stored log-probs come from batches of another shape."""
COARSE = 0.03
"""The same where a forward pass has fewer bits."""


def differs(ratios: Tensor, counts: Tensor, *, coarse: bool, dtype: torch.dtype) -> Tensor:
    """Whether policy and reference differ by more than rounding, as a scalar tensor.

    Args:
        ratios: (B,) log-ratios of responses, in nats.
        counts: (B,) their tokens.
        coarse: whether the forward pass has fewer bits than float32.
        dtype: of the policy's weights.
    """
    limit = COARSE if coarse else TOLERANCE.get(dtype, COARSE)
    return (ratios.detach().abs() > limit * counts.clamp(min=1)).any()


def batch_faults(batch: PreferenceBatch, *, bos_id: int | None = None) -> list[str]:
    """What is wrong with where a batch's targets stand.

    Args:
        batch: B pairs.
        bos_id: of the tokenizer; where it is not known, one id that begins every row twice is taken for it.
    """
    faults = []
    sides = (batch["chosen"], batch["rejected"])
    if any(bool((side["targets"] & ~side["mask"]).any()) for side in sides):
        faults.append("mask: pads are trained; the targets stand beside the responses that they are meant for")
    elif all(_last_untrained(side) for side in sides):
        faults.append("mask: the last token of every response is not trained; the targets may stand one too early")
    elif _first_untrained(*sides):
        faults.append(
            "mask: the first tokens that chosen and rejected differ in are not trained; the targets may stand too late"
        )
    starts = torch.cat([side["tokens"][:, :2] for side in sides])
    doubled = starts.shape[1] == 2 and bool((starts == (starts[0, 0] if bos_id is None else bos_id)).all())
    # Of a single pair it says nothing: its prompt may begin with a doubled letter.
    if doubled and (bos_id is not None or len(starts) > 2):
        faults.append(f"BOS: every row begins with token {int(starts[0, 0])} twice; a template and the tokenizer both write it")
    return faults


def _last_untrained(side: TokenBatch) -> bool:
    last = side["mask"].sum(dim=1, keepdim=True) - 1
    return not bool(side["targets"].gather(1, last.clamp(min=0)).any())


def _first_untrained(chosen: TokenBatch, rejected: TokenBatch) -> bool:
    """Whether in most pairs the first difference of the two sides is no target."""
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
    """Why a policy that should be its reference is not, by at most two forward passes.

    Args:
        policy: in the mode that it trains in.
        reference: the reference's model, if it is one of its own.
        batch: (2B, N).
        expected: what the reference said of it.
        coarse: as for `differs`.
    """
    dtype = next(policy.parameters()).dtype
    other = None if reference is None else next(reference.parameters()).dtype
    if other is not None and other is not dtype:
        return f"dtype: the policy is in {dtype} and the reference in {other}"

    def same() -> bool:
        found = response_logprobs(policy, batch)
        return not bool(differs(found.sums - expected.sums, found.counts, coarse=coarse, dtype=dtype))

    modes = {module: module.training for module in policy.modules()}
    policy.eval()
    try:
        if same():
            return "dropout: in evaluation mode the policy is the reference; set dropout to 0 for rewards without its noise"
        if lora_layers(policy):
            with lora_disabled(policy):
                if same():
                    return "adapter: without its adapters the policy is the reference; they begin at something else than 0"
    finally:
        for module, training in modes.items():
            module.training = training
    return "reference file: the reference has other weights than the policy begins with"
