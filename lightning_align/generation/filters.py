"""From logits to the next token: temperature, then top-k, then top-p, then min-p, then one draw."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Draws that may fall outside of the nucleus before it is found by sorting; see `choose`.
ATTEMPTS = 4
# A cumulative sum over a vocabulary goes by blocks: faster than one long sum, and exact to rounding in float32.
BLOCK = 256
# Just below 1, with room for the rounding of a product and a sum.
BELOW_ONE = 1 - 2**-22


class Filters(Protocol):
    """The settings that decide which tokens may be drawn; `GenerationConfig` has them."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Scale the logits and set those of the tokens that are left out to -inf.

    Each filter sees what the one before left. Tokens that are equally likely stay or go together.

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
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(dim=-1)
        # A token goes if those before it reach p without it; so the first one always stays.
        gone = probabilities.cumsum(dim=-1) - probabilities >= top_p
        threshold = ordered.masked_fill(gone, torch.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + torch.tensor(min_p).log(), -torch.inf)
    return logits


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative sum of the weights passes a share of their total.

    Args:
        weights: (B, V) at least 0, of any total above 0; a token of weight 0 is never drawn.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64. Without a synchronisation with the device.
    """
    rows, vocabulary = weights.shape
    if vocabulary <= BLOCK:
        reached = weights.cumsum(dim=-1)
        bound = (uniforms[:, None] * reached[:, -1:]).minimum(reached[:, -1:] * BELOW_ONE)
        return (reached <= bound).sum(dim=-1)
    if vocabulary % BLOCK:
        weights = F.pad(weights, (0, BLOCK - vocabulary % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    sums = blocks.sum(dim=-1)
    reached = sums.cumsum(dim=-1)
    # Each search is for the first sum above a bound that is below the last sum, so it ends at a weight above 0.
    bound = (uniforms[:, None] * reached[:, -1:]).minimum(reached[:, -1:] * BELOW_ONE)
    block = (reached <= bound).sum(dim=-1, keepdim=True)
    bound = bound - (reached - sums).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=-1)
    bound = bound.minimum(inside[:, -1:] * BELOW_ONE)
    return block.squeeze(1) * BLOCK + (inside <= bound).sum(dim=-1)


def choose(logits: Tensor, uniforms: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-prob under the model, without temperature and filters.

    Args:
        logits: (B, V).
        uniforms: (B, `num_draws`) in [0, 1).
        filters: what may be drawn; a temperature of 0 takes the likeliest.

    Returns:
        (B,) int64 tokens and (B,) float32 log-probs in nats.
    """
    logits = logits.float()
    if filters.temperature == 0:
        maxima, tokens = logits.max(dim=-1)
        return tokens, -(logits - maxima[:, None]).exp_().sum(dim=-1).log()
    candidates, names = logits, None
    if filters.top_k is not None and filters.top_k < logits.shape[-1]:
        candidates, names = logits.topk(filters.top_k, dim=-1)
    weights = (candidates - candidates.amax(dim=-1, keepdim=True)).div_(filters.temperature).exp_()
    if filters.top_p == 1 and filters.min_p == 0:
        tokens = draw(weights, uniforms[:, 0])
    elif weights.is_cuda:
        tokens = draw(_filtered(weights, filters), uniforms[:, 0])
    else:
        tokens = _draw_within(weights, uniforms, filters)
    if names is not None:
        tokens = names.gather(1, tokens[:, None]).squeeze(1)
    return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


def num_draws(filters: Filters) -> int:
    """How many uniform numbers `choose` may use for a token."""
    return 1 if filters.top_p == 1 and filters.min_p == 0 else ATTEMPTS + 1


def _draw_within(weights: Tensor, uniforms: Tensor, filters: Filters) -> Tensor:
    """A draw among the tokens that top-p and min-p leave, without sorting the vocabulary.

    Whether a token is left out can be told from the mass of the likelier ones, so a draw from all of them is repeated where
    it fell outside: at p = 0.9, once in ten. What is still outside after `ATTEMPTS` is drawn after sorting.
    """
    tokens = draw(weights, uniforms[:, 0])
    rows = torch.arange(len(weights))
    for attempt in range(1, ATTEMPTS + 1):
        here = weights if len(rows) == len(weights) else weights[rows]
        own = here.gather(1, tokens[rows, None])
        likelier = torch.where(here > own, here, 0).sum(dim=-1)
        # Of weights whose maximum is 1.
        outside = (likelier >= filters.top_p * here.sum(dim=-1)) | (own.squeeze(1) < filters.min_p)
        if not bool(outside.any()):
            break
        rows = rows[outside]
        here = weights[rows] if attempt < ATTEMPTS else _filtered(weights[rows], filters)
        tokens[rows] = draw(here, uniforms[rows, attempt])
    return tokens


def _filtered(weights: Tensor, filters: Filters) -> Tensor:
    return filter_logits(weights.log(), top_p=filters.top_p, min_p=filters.min_p).exp_()
