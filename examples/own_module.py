"""Your own LightningModule with the callbacks of this library. The callbacks only need the language model as `policy`.

python examples/own_module.py
"""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_align import Arithmetic, ExportModel, PaLM, SampleLogger, SFTDataModule, SolveRate


class LabelSmoothing(L.LightningModule):
    """A module with a custom loss: cross entropy with label smoothing."""

    def __init__(self, policy: nn.Module, smoothing: float = 0.1) -> None:
        """Set up the module.

        Args:
            policy: The language model.
            smoothing: The share of the target probability that is spread over the vocabulary.
        """
        super().__init__()
        self.policy, self.smoothing = policy, smoothing

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the cross entropy of the response tokens. The logits at each position predict the next token."""
        logits = self.policy(batch["tokens"])[:, :-1][batch["targets"][:, 1:]]
        loss = F.cross_entropy(logits, batch["tokens"][:, 1:][batch["targets"][:, 1:]], label_smoothing=self.smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing. The callbacks validate by decoding."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam for all parameters."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(steps: int = 12, folder: str = "export") -> L.Trainer:
    """Train a small model and return the trainer, which has the logged metrics."""
    torch.manual_seed(0)
    train, held_out = (Arithmetic(num_rows=256, split=split) for split in ("train", "validation"))
    data = SFTDataModule(train, validation=held_out, batch_size=16, eval_batch_size=32, max_length=128)
    module = LabelSmoothing(PaLM(num_tokens=259, dim=64, depth=2, heads=2, dim_head=32))
    callbacks = [
        SampleLogger(num_samples=2, max_new_tokens=8),
        SolveRate(held_out, num_problems=8, max_new_tokens=8),
        ExportModel(folder),
    ]
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, val_check_interval=4, callbacks=callbacks, accelerator="cpu", logger=False
    )
    trainer.fit(module, data)
    return trainer


if __name__ == "__main__":
    print({name: float(value) for name, value in main().callback_metrics.items()})
