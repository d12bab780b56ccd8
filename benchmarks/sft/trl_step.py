"""An SFT step on a Llama against `SFTTrainer` of TRL 1.16.

Both sides get the same initial weights, batches, padding, optimizer and clipping. TRL runs its own `training_step`. The rows
are the chosen sides of preference pairs, and the loss is on the responses.
"""

from collections.abc import Sequence

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.common import peer_trl
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch

ROWS = 16


def peer(vocabulary: int, batches: list[PreferenceBatch]) -> peer_trl.Step:
    """A step of TRL's trainer."""
    rows = Dataset.from_list([{"prompt": "a", "completion": "a a"}] * ROWS)  # the trainer requires a dataset
    trainer = SFTTrainer(
        peer_trl.llama(vocabulary),
        args=SFTConfig(**peer_trl.settings(ROWS)),
        train_dataset=rows,
        processing_class=peer_trl.tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1  # `train` would set this
    model = trainer.model
    model.train()
    update = peer_trl.updates(model)

    def step(number: int) -> float:
        side = batches[number]["chosen"]
        labels = side["tokens"].where(side["targets"], -100)
        inputs = {"input_ids": side["tokens"], "attention_mask": side["mask"].long(), "labels": labels}
        loss = trainer.training_step(model, inputs)
        update()
        return float(loss)

    return step


def ours(vocabulary: int, batches: list[PreferenceBatch]) -> peer_trl.Step:
    """Our loss on the same model."""
    policy = peer_trl.ours(vocabulary)
    policy.train()
    update = peer_trl.updates(policy)

    def step(number: int) -> float:
        sums, counts = response_logprobs(policy, batches[number]["chosen"])
        loss = -sums.sum() / counts.sum()
        loss.backward()
        update()
        return float(loss)

    return step


def shares(batches: Sequence[PreferenceBatch]) -> tuple[float, float]:
    """Shares of padding and of response tokens among all positions of the chosen sides."""
    sides = [batch["chosen"] for batch in batches]
    positions = sum(side["mask"].numel() for side in sides)
    return 1 - sum(int(s["mask"].sum()) for s in sides) / positions, sum(int(s["targets"].sum()) for s in sides) / positions


if __name__ == "__main__":
    peer_trl.compare(
        __file__,
        {"peer": peer, "ours": ours},
        title="An SFT step",
        description=__doc__,
        rows=ROWS,
        unit="rows",
        bars=lambda _: (1.5, None),
        shares=shares,
    )
