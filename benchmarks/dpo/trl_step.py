"""A DPO step on a Llama against `DPOTrainer` of TRL 1.16.

Both sides get the same initial weights, batches, padding, optimizer and clipping. TRL runs its own `training_step`. The
``stored`` sides have precomputed log-probs of the reference. ``recomputed`` is ours with gradient checkpointing.
"""

from functools import partial

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from benchmarks.common import peer_trl
from lightning_align.dpo.batch import concatenate
from lightning_align.references.frozen import frozen_copy
from lightning_align.scoring.losses import sigmoid_loss
from lightning_align.scoring.ratios import log_ratios, pair_metrics
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, PreferenceBatch

PAIRS, BETA = 8, 0.1


def inputs(batch: PreferenceBatch) -> dict[str, Tensor]:
    """A batch in the format of TRL's collator: chosen rows, then rejected rows."""
    both = concatenate(batch)
    return {
        "input_ids": both["tokens"],
        "attention_mask": both["mask"].long(),
        "completion_mask": both["targets"].long(),
    }


def peer(vocabulary: int, batches: list[PreferenceBatch], stored: bool) -> peer_trl.Step:
    """A step of TRL's trainer."""
    rows = Dataset.from_list([{"prompt": "a", "chosen": "a a", "rejected": "a"}] * PAIRS)  # the trainer requires a dataset
    arguments = DPOConfig(beta=BETA, **peer_trl.settings(PAIRS))
    policy, reference = peer_trl.llama(vocabulary), peer_trl.llama(vocabulary)
    trainer = DPOTrainer(policy, reference, args=arguments, train_dataset=rows, processing_class=peer_trl.tokenizer())
    trainer.current_gradient_accumulation_steps = 1  # `train` would set this
    model = trainer.model
    model.train()
    ready: list[dict[str, Tensor]] = [inputs(batch) for batch in batches]
    if stored:
        for each in ready:
            with torch.no_grad():
                chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, each)
            each |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        trainer.precompute_ref_logps, trainer.ref_model = True, None
    update = peer_trl.updates(model)

    def step(number: int) -> float:
        loss = trainer.training_step(model, dict(ready[number]))
        update()
        return float(loss)

    return step


def ours(vocabulary: int, batches: list[PreferenceBatch], stored: bool, recompute: bool = False) -> peer_trl.Step:
    """Our loss on the same model, and the metrics that `DPOModule` logs."""
    policy = peer_trl.ours(vocabulary, recompute)
    reference = frozen_copy(policy)
    policy.train()
    kept: list[LogProbs] = []
    if stored:
        kept = [reference.logprobs(policy, concatenate(batch)) for batch in batches]
        del reference
    update = peer_trl.updates(policy)

    def step(number: int) -> float:
        both = concatenate(batches[number])
        referred = kept[number] if stored else reference.logprobs(policy, both)
        scored = response_logprobs(policy, both)
        ratios = log_ratios(scored, referred)
        loss = sigmoid_loss(ratios, beta=BETA).mean()
        loss.backward()
        update()
        for values in pair_metrics(scored, ratios, beta=BETA).values():
            values.mean().item()
        return float(loss)

    return step


SIDES = {
    "peer": partial(peer, stored=False),
    "ours": partial(ours, stored=False),
    "ours, recomputed": partial(ours, stored=False, recompute=True),
    "peer, stored": partial(peer, stored=True),
    "ours, stored": partial(ours, stored=True),
}

if __name__ == "__main__":
    peer_trl.compare(
        __file__,
        SIDES,
        title="A DPO step",
        description=__doc__,
        rows=PAIRS,
        unit="pairs",
        bars=lambda vocabulary: (3.0, 0.4 if vocabulary <= 32_000 else 0.3),
    )
