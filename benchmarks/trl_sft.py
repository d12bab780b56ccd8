"""An SFT training step on one Llama: this library against `SFTTrainer` of TRL 1.16, which runs its own `training_step`.

The rows are the chosen sides of the pairs, and the loss is on the responses: both sides get the same initial weights, the
same batches with the same padding, optimizer and clipping.
"""

from collections.abc import Sequence

import _trl
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch

ROWS = 16


def peer(vocabulary: int, batches: list[PreferenceBatch]) -> _trl.Step:
    """TRL's trainer, step by step."""
    rows = Dataset.from_list([{"prompt": "a", "completion": "a a"}] * ROWS)  # the trainer asks for some
    trainer = SFTTrainer(
        _trl.llama(vocabulary),
        args=SFTConfig(**_trl.settings(ROWS)),
        train_dataset=rows,
        processing_class=_trl.tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1  # what its `train` would set
    model = trainer.model
    model.train()
    update = _trl.updates(model)

    def step(number: int) -> float:
        side = batches[number]["chosen"]
        labels = side["tokens"].where(side["targets"], -100)
        inputs = {"input_ids": side["tokens"], "attention_mask": side["mask"].long(), "labels": labels}
        loss = trainer.training_step(model, inputs)
        update()
        return float(loss)

    return step


def ours(vocabulary: int, batches: list[PreferenceBatch]) -> _trl.Step:
    """Our loss on the same model."""
    policy = _trl.ours(vocabulary)
    policy.train()
    update = _trl.updates(policy)

    def step(number: int) -> float:
        sums, counts = response_logprobs(policy, batches[number]["chosen"])
        loss = -sums.sum() / counts.sum()
        loss.backward()
        update()
        return float(loss)

    return step


def shares(batches: Sequence[PreferenceBatch]) -> tuple[float, float]:
    """Share of padding, and of responses, in all positions of the chosen sides."""
    sides = [batch["chosen"] for batch in batches]
    positions = sum(side["mask"].numel() for side in sides)
    return 1 - sum(int(s["mask"].sum()) for s in sides) / positions, sum(int(s["targets"].sum()) for s in sides) / positions


if __name__ == "__main__":
    _trl.compare(
        __file__,
        {"peer": peer, "ours": ours},
        title="An SFT step",
        rows=ROWS,
        unit="rows",
        bars=lambda _: (1.5, None),
        shares=shares,
    )
