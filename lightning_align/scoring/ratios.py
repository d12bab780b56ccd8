"""Log-ratios of pairs, the weights of pairs, and the metrics of pairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_align.types import LogProbs


class Ratios(NamedTuple):
    """Log-ratios of pairs: sums over the response in nats, and lengths in tokens."""

    chosen: Tensor
    """(B,) r_w."""
    rejected: Tensor
    """(B,) r_l."""
    chosen_lengths: Tensor
    """(B,) |y_w|."""
    rejected_lengths: Tensor
    """(B,) |y_l|."""
    policy_delta: Tensor | None = None
    """(B,) log p(y_w) - log p(y_l), which `aot` sorts by itself."""

    @property
    def delta(self) -> Tensor:
        """(B,) r_w - r_l."""
        return self.chosen - self.rejected

    @property
    def chosen_mean(self) -> Tensor:
        """(B,) r_w / |y_w|; 0 for an empty response."""
        return self.chosen / self.chosen_lengths.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        """(B,) r_l / |y_l|; 0 for an empty response."""
        return self.rejected / self.rejected_lengths.clamp(min=1)

    @property
    def mean_delta(self) -> Tensor:
        """(B,) r_w / |y_w| - r_l / |y_l|."""
        return self.chosen_mean - self.rejected_mean


def split_pairs(logprobs: LogProbs) -> tuple[LogProbs, LogProbs]:
    """Undo the concatenation of chosen and rejected rows: (2B,) -> (B,), (B,)."""
    pairs = logprobs.sums.shape[0] // 2
    chosen, rejected = (LogProbs(logprobs.sums[part], logprobs.counts[part]) for part in (slice(pairs), slice(pairs, None)))
    return chosen, rejected


def tail_weights(targets: Tensor, alpha: float) -> Tensor:
    """What each target counts, where those beyond the length of the other response of a pair count only a share.

    LD-DPO, Liu et al. 2024, arXiv 2409.06411, equation 9: log p = log p(head) + a log p(tail).

    Args:
        targets: (2B, N) bool, chosen rows first.
        alpha: the share, from 0 to 1.

    Returns:
        (2B, N) float32.
    """
    counts = targets.sum(dim=1)
    shared = torch.minimum(*counts.chunk(2)).repeat(2)
    return torch.where(targets.cumsum(dim=1) <= shared[:, None], 1.0, alpha)


def confidence_weights(policy: LogProbs, collisions: Tensor) -> Tensor:
    """Weights (B,) of pairs by how likely the policy itself finds both responses, without gradients.

    WPO with its sampled alignment, Zhou et al. 2024, arXiv 2406.11827, equation 6: the product over both responses of
    exp(mean over tokens of log p(y_t) - log sum_v p_v^2).

    Args:
        policy: (2B,).
        collisions: (2B,) as `lightning_align.scoring.collisions.response_collisions` gives them.
    """
    means = (policy.sums.detach() - collisions) / policy.counts.clamp(min=1)
    chosen, rejected = means.chunk(2)
    return (chosen + rejected).exp()


def log_ratios(policy: LogProbs, reference: LogProbs | None) -> Ratios:
    """Ratios of a batch of pairs whose first half are the chosen rows, (2B,) each; without a reference, to 1."""
    chosen, rejected = split_pairs(policy)
    delta = chosen.sums - rejected.sums
    if reference is None:
        return Ratios(chosen.sums, rejected.sums, chosen.counts, rejected.counts, delta)
    ref_chosen, ref_rejected = split_pairs(reference)
    return Ratios(chosen.sums - ref_chosen.sums, rejected.sums - ref_rejected.sums, chosen.counts, rejected.counts, delta)


@torch.no_grad()
def pair_metrics(policy: LogProbs, ratios: Ratios, *, beta: float) -> dict[str, Tensor]:
    """What is logged, a value a pair (B,): implicit rewards b r, their margins, and the policy's log-probs (sums, in nats)."""
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
