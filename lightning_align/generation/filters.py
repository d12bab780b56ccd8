"""From logits to the next token. The order is temperature, top-k, top-p, min-p, typical-p, and one draw.

The filters that depend on the tokens before come first, and ids that do not exist are removed last before these. See
`lightning_align.generation.history` and `lightning_align.generation.support`.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# The number of draws from all tokens before the tokens are sorted. See `_draw_within`.
ATTEMPTS = 4
# The block size of cumulative sums over the vocabulary. Blocks are faster than one long sum, and exact to float32 rounding.
BLOCK = 256
# Slightly below 1. The margin covers the rounding of one product and one sum.
BELOW_ONE = 1 - 2**-22


class Filters(Protocol):
    """The settings that decide which tokens may be drawn. `GenerationConfig` has them."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    typical_p: float


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
) -> Tensor:
    """Scale the logits and set the logits of removed tokens to -inf.

    Each filter acts on the tokens that the filter before it kept. Tokens of equal probability are kept or removed together.

    Args:
        logits: The logits, (B, V).
        temperature: The divisor of the logits, applied first. Must be above 0.
        top_k: Keep the k most likely tokens.
        top_p: Keep the smallest set of most likely tokens that has a total probability of at least p (Holtzman et al. 2020,
            arXiv 1904.09751).
        min_p: Keep tokens that are at least min_p times as likely as the most likely token (Nguyen et al. 2024,
            arXiv 2407.01082).
        typical_p: Keep the smallest set of tokens whose information -log p is nearest to the entropy of the distribution,
            and that has a total probability of at least typical_p (Meister et al. 2022, arXiv 2202.00666, equation 9).

    Returns:
        The filtered logits, (B, V) float32.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(dim=-1)
        # A token is removed if the tokens before it reach p without it. The first token is therefore always kept.
        gone = probabilities.cumsum(dim=-1) - probabilities >= top_p
        threshold = ordered.masked_fill(gone, torch.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if min_p > 0:
        ratio = torch.tensor(min_p, dtype=torch.float32).log()
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + ratio, -torch.inf)
    if typical_p < 1:
        logps = logits.log_softmax(dim=-1)
        entropy = -(logps.exp() * logps).nansum(dim=-1, keepdim=True)
        distance = (-logps - entropy).abs()
        ordered, order = distance.sort(dim=-1)
        reached = logps.gather(-1, order).exp().cumsum(dim=-1)
        last = (reached < typical_p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        logits = logits.masked_fill(distance > ordered.gather(-1, last), -torch.inf)
    return logits


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw the token at which the cumulative sum of the weights passes a share of their total.

    Does not synchronize with the device.

    Args:
        weights: The weight of each token, (B, V), at least 0 and with a total above 0. A token of weight 0 is never drawn.
        uniforms: The share of the total for each row, (B,) in [0, 1).

    Returns:
        The tokens, (B,) int64.
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
    # Each search finds the first sum above a bound. The bound is below the last sum, so the result has a weight above 0.
    bound = (uniforms[:, None] * reached[:, -1:]).minimum(reached[:, -1:] * BELOW_ONE)
    block = (reached <= bound).sum(dim=-1, keepdim=True)
    bound = bound - (reached - sums).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=-1)
    bound = bound.minimum(inside[:, -1:] * BELOW_ONE)
    return block.squeeze(1) * BLOCK + (inside <= bound).sum(dim=-1)


def choose(logits: Tensor, uniforms: Tensor, filters: Filters, *, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw the next token of each row, and compute its log-prob under the model.

    The log-prob ignores temperature and filters. It is not finite if and only if no token can be chosen: the logits are NaN
    or infinite, or every token is removed. This is seen where the log-prob is read, so nothing waits for the device here.

    Args:
        logits: The logits of the model, (B, V).
        uniforms: Uniform random numbers, (B, `num_draws`) in [0, 1).
        filters: The settings that decide which tokens may be drawn. A temperature of 0 takes the most likely token.
        allowed: The logits to choose from, (B, V), with -inf at removed tokens. Default is `logits`.

    Returns:
        The tokens, (B,) int64, and their log-probs in nats, (B,) float32.
    """
    logits = logits.float()
    given = allowed is not None and allowed is not logits
    allowed = allowed.float() if allowed is not None and given else logits
    if filters.temperature == 0:
        maxima, tokens = allowed.max(dim=-1)
        if not given:
            return tokens, -(logits - maxima[:, None]).exp_().sum(dim=-1).log()
        return tokens, _logprobs(logits, tokens, maxima)
    candidates, names = allowed, None
    if filters.top_k is not None and filters.top_k < allowed.shape[-1]:
        candidates, names = allowed.topk(filters.top_k, dim=-1)
    maxima = candidates.amax(dim=-1)
    weights = (candidates - maxima[:, None]).div_(filters.temperature).exp_()
    if _draws_once(filters):
        tokens = draw(weights, uniforms[:, 0])
    elif weights.device.type != "cpu" or filters.typical_p < 1:
        tokens = draw(_filtered(weights, filters), uniforms[:, 0])
    else:
        tokens = _draw_within(weights, uniforms, filters)
    # The weights of a row without any choice are NaN, and what is drawn from them may be any number.
    tokens = tokens.clamp(max=candidates.shape[-1] - 1)
    if names is not None:
        tokens = names.gather(1, tokens[:, None]).squeeze(1)
    return tokens, _logprobs(logits, tokens, maxima)


def _logprobs(logits: Tensor, tokens: Tensor, maxima: Tensor) -> Tensor:
    """Return the log-probs of tokens, NaN where the largest logit to choose from is not finite."""
    logps = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=-1)
    return torch.where(maxima.isfinite(), logps, torch.nan)


def num_draws(filters: Filters) -> int:
    """Return how many uniform numbers `choose` may use per token."""
    return 1 if _draws_once(filters) else ATTEMPTS + 1


def _draws_once(filters: Filters) -> bool:
    return filters.top_p == 1 and filters.min_p == 0 and filters.typical_p == 1


def _draw_within(weights: Tensor, uniforms: Tensor, filters: Filters) -> Tensor:
    """Draw among the tokens that top-p and min-p keep, without sorting the vocabulary.

    The function draws from all tokens. The total weight of the more likely tokens shows whether top-p removes the drawn
    token. If a filter removes it, the draw is repeated. At p = 0.9 this happens once in ten draws. After `ATTEMPTS` failed
    draws, the function sorts the tokens and draws from the filtered ones.
    """
    tokens = draw(weights, uniforms[:, 0])
    rows = torch.arange(len(weights))
    for attempt in range(1, ATTEMPTS + 1):
        here = weights if len(rows) == len(weights) else weights[rows]
        own = here.gather(1, tokens[rows, None])
        likelier = torch.where(here > own, here, 0).sum(dim=-1)
        # `min_p` applies directly, because the largest weight of a row is 1.
        outside = (likelier >= filters.top_p * here.sum(dim=-1)) | (own.squeeze(1) < filters.min_p)
        if not bool(outside.any()):
            break
        rows = rows[outside]
        here = weights[rows] if attempt < ATTEMPTS else _filtered(weights[rows], filters)
        tokens[rows] = draw(here, uniforms[rows, attempt])
    return tokens


def _filtered(weights: Tensor, filters: Filters) -> Tensor:
    return filter_logits(weights.log(), top_p=filters.top_p, min_p=filters.min_p, typical_p=filters.typical_p).exp_()
