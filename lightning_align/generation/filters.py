"""From logits to the next token: temperature, then top-k, then top-p, then min-p, then one draw."""

import torch
from torch import Tensor


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Scale the logits and set those of the tokens that are left out to -inf.

    Each filter sees what the one before left.

    Args:
        logits: (B, V).
        temperature: above 0; the logits are divided by it first.
        top_k: keep the k likeliest tokens.
        top_p: keep the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020, arXiv 1904.09751).
        min_p: keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).

    Returns:
        (B, V) float32.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token goes if those before it reach p without it; so the first one always stays.
        gone = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + torch.tensor(min_p).log(), -torch.inf)
    return logits


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row from softmax(logits), (B, V) -> (B,), by the exponential race: no synchronisation with the host."""
    # Never 0: where a token is left out, 0 / 0 would be NaN, which argmax takes for the largest.
    race = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=torch.finfo(logits.dtype).tiny)
    return (logits.softmax(dim=-1) / race).argmax(dim=-1)
