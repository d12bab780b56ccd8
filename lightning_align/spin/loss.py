"""The loss of self-play as functions: from two sequences, or from their log-probs."""

from torch import Tensor, nn

from lightning_align.generation.sampler import evaluating
from lightning_align.scoring.losses import LOSSES, LossName, check_loss
from lightning_align.scoring.ratios import Ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.spin.batches import collate_ids, split_rows
from lightning_align.spin.generations import join_pairs


def spin_loss(
    policy_real: Tensor,
    policy_generated: Tensor,
    opponent_real: Tensor,
    opponent_generated: Tensor,
    *,
    loss: LossName = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    real_lengths: Tensor | None = None,
    generated_lengths: Tensor | None = None,
) -> Tensor:
    """Compute l(b [(log p(y|x) - log q(y|x)) - (log p(y'|x) - log q(y'|x))]) of each pair.

    Chen et al. 2024, arXiv 2401.01335, equation 4.7, with l by the name of `loss`.

    Args:
        policy_real: Log-probs log p(y|x) of the real responses under the policy: sums in nats, (B,).
        policy_generated: Log-probs log p(y'|x) of the generated responses under the policy, (B,).
        opponent_real: Log-probs log q(y|x) under the opponent, (B,).
        opponent_generated: Log-probs log q(y'|x) under the opponent, (B,).
        loss: The name of the loss; see `SPINModule`. Default is `sigmoid`.
        beta: The factor b, which is lambda in the paper. Default is 0.1.
        label_smoothing: The label smoothing of the losses that have one. Default is 0.
        real_lengths: The numbers of tokens of the real responses, (B,). Needed by losses on mean log-probs.
        generated_lengths: The numbers of tokens of the generated responses, (B,).

    Returns:
        The losses, (B,).

    Raises:
        ValueError: If an argument is out of range, or the loss needs lengths and there are none.
    """
    check_loss(loss, beta=beta, label_smoothing=label_smoothing)
    if loss in ("sigmoid_norm", "ipo", "simpo", "orpo") and (real_lengths is None or generated_lengths is None):
        raise ValueError(
            f"`real_lengths` and `generated_lengths` must be given for the {loss} loss, which is on mean log-probs."
        )
    ones = policy_real.new_ones(policy_real.shape).long()
    ratios = Ratios(
        policy_real - opponent_real,
        policy_generated - opponent_generated,
        ones if real_lengths is None else real_lengths,
        ones if generated_lengths is None else generated_lengths,
        policy_real - policy_generated,
    )
    return LOSSES[loss](ratios, beta=beta, label_smoothing=label_smoothing)


def self_play_loss(
    policy: nn.Module,
    opponent: nn.Module,
    real: Tensor,
    generated: Tensor,
    prompt_lengths: Tensor,
    *,
    loss: LossName = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the self-play loss of each pair from its two sequences.

    Only the policy gets gradients. The opponent scores in evaluation mode. The published trainer averages log-probs over the
    tokens of a response. For this, use `sigmoid_norm`.

    Args:
        policy: The language model that trains.
        opponent: The language model that generated. It may be the policy.
        real: The ids of prompt and real response, (B, N). Negative ids at the end of a row are padding.
        generated: The ids of prompt and generated response, (B, M), with the same padding.
        prompt_lengths: The numbers of ids of the prompts, (B,).
        loss: See `spin_loss`.
        beta: See `spin_loss`.
        label_smoothing: See `spin_loss`.

    Returns:
        The losses, (B,).
    """
    prompts = prompt_lengths.tolist()
    rows, targets, _ = split_rows(collate_ids(list(zip(real, prompts, strict=True))))
    answers, _, _ = split_rows(collate_ids(list(zip(generated, prompts, strict=True))))
    pairs = join_pairs(rows, targets, answers, prompts, pad_id=0)
    own = response_logprobs(policy, pairs)
    with evaluating(opponent):
        other = response_logprobs(opponent, pairs).sums
    lengths = own.counts.chunk(2)
    return spin_loss(
        *own.sums.chunk(2),
        *other.chunk(2),
        loss=loss,
        beta=beta,
        label_smoothing=label_smoothing,
        real_lengths=lengths[0],
        generated_lengths=lengths[1],
    )
