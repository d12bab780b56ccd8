"""Log-ratios, weights and metrics of pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_align.types import LogProbs


class Ratios(NamedTuple):
    """Log-ratios of pairs: sums over each response in nats, and lengths in tokens."""

    chosen: Tensor
    """(B,) r_w, the log-ratio of the chosen response."""
    rejected: Tensor
    """(B,) r_l, the log-ratio of the rejected response."""
    chosen_lengths: Tensor
    """(B,) |y_w|, the number of tokens of the chosen response."""
    rejected_lengths: Tensor
    """(B,) |y_l|, the number of tokens of the rejected response."""
    policy_delta: Tensor | None = None
    """(B,) log p(y_w) - log p(y_l) under the policy. Only `aot` needs it, which sorts it separately."""

    @property
    def delta(self) -> Tensor:
        """(B,) r_w - r_l."""
        return self.chosen - self.rejected

    @property
    def chosen_mean(self) -> Tensor:
        """(B,) r_w / |y_w|. It is 0 for an empty response."""
        return self.chosen / self.chosen_lengths.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        """(B,) r_l / |y_l|. It is 0 for an empty response."""
        return self.rejected / self.rejected_lengths.clamp(min=1)

    @property
    def mean_delta(self) -> Tensor:
        """(B,) r_w / |y_w| - r_l / |y_l|."""
        return self.chosen_mean - self.rejected_mean


def split_pairs(logprobs: LogProbs) -> tuple[LogProbs, LogProbs]:
    """Split the log-probs of 2B rows, chosen rows first, into (B,) chosen and (B,) rejected."""
    pairs = logprobs.sums.shape[0] // 2
    chosen, rejected = (LogProbs(logprobs.sums[part], logprobs.counts[part]) for part in (slice(pairs), slice(pairs, None)))
    return chosen, rejected


def tail_weights(targets: Tensor, alpha: float) -> Tensor:
    """Return the weight of each target: ``alpha`` beyond the length of the pair's shorter response, else 1.

    LD-DPO, Liu et al. 2024, arXiv 2409.06411, equation 9: log p = log p(head) + a log p(tail).

    Args:
        targets: (2B, N) bool, true at targets, chosen rows first.
        alpha: The weight of the tail, from 0 to 1.

    Returns:
        (2B, N) float32 weights.
    """
    counts = targets.sum(dim=1)
    shared = torch.minimum(*counts.chunk(2)).repeat(2)
    weights = torch.ones(targets.shape, dtype=torch.float32, device=targets.device)
    return weights.masked_fill_(targets.cumsum(dim=1) > shared[:, None], alpha)


def confidence_weights(policy: LogProbs, collisions: Tensor) -> Tensor:
    """Compute a weight for each pair from how likely both responses are under the policy.

    WPO with sampled alignment, Zhou et al. 2024, arXiv 2406.11827, equation 6: the product over both responses of
    exp(mean over tokens of log p(y_t) - log sum_v p_v^2).

    Args:
        policy: (2B,) log-probs under the policy, chosen rows first.
        collisions: (2B,) values of `lightning_align.scoring.collisions.response_collisions`, in nats.

    Returns:
        (B,) weights, without gradients.
    """
    means = (policy.sums.detach() - collisions) / policy.counts.clamp(min=1)
    chosen, rejected = means.chunk(2)
    return (chosen + rejected).exp()


def log_ratios(policy: LogProbs, reference: LogProbs | None) -> Ratios:
    """Compute the log-ratios of a batch of pairs.

    Args:
        policy: (2B,) log-probs under the policy, chosen rows first.
        reference: (2B,) log-probs under the reference in the same order. None stands for log-probs of 0.
    """
    chosen, rejected = split_pairs(policy)
    delta = chosen.sums - rejected.sums
    if reference is None:
        return Ratios(chosen.sums, rejected.sums, chosen.counts, rejected.counts, delta)
    ref_chosen, ref_rejected = split_pairs(reference)
    return Ratios(chosen.sums - ref_chosen.sums, rejected.sums - ref_rejected.sums, chosen.counts, rejected.counts, delta)


@torch.no_grad()
def pair_metrics(policy: LogProbs, ratios: Ratios, *, beta: float) -> dict[str, Tensor]:
    """Compute the metrics of each pair, by the names they are logged under.

    Args:
        policy: (2B,) log-probs under the policy, chosen rows first.
        ratios: The log-ratios of the B pairs.
        beta: The factor b in the implicit rewards b r.

    Returns:
        (B,) values per name: implicit rewards, their margins and accuracies, and log-probs under the policy (sums, in nats).
    """
    chosen, rejected = split_pairs(policy)
    rewards_chosen, rewards_rejected = beta * ratios.chosen, beta * ratios.rejected
    return {
        "rewards/chosen": rewards_chosen,
        "rewards/rejected": rewards_rejected,
        "rewards/margins": rewards_chosen - rewards_rejected,
        "rewards/accuracies": (rewards_chosen > rewards_rejected).float(),
        "logps/chosen": chosen.sums.detach(),
        "logps/rejected": rejected.sums.detach(),
    }
