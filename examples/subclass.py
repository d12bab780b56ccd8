"""DPO with another optimizer and one more logged value. The subclass contains only the changes.

python examples/subclass.py pairs.jsonl
"""

import sys
from typing import Any

import lightning as L
import torch

from lightning_align import DPODataModule, DPOModule, PaLM


class LoudDPO(DPOModule):
    """`DPOModule` that uses SGD with momentum and logs the norm of its weights."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum for all trainable parameters."""
        return torch.optim.SGD([p for p in self.policy.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Run the step of `DPOModule` and log the norm of the weights."""
        loss = super().training_step(batch, batch_idx)
        self.log("train/weight_norm", torch.nn.utils.get_total_norm(self.policy.parameters()))
        return loss


def main(pairs: str, steps: int = 20) -> L.Trainer:
    """Train a small model and return the trainer, which has the logged metrics."""
    data = DPODataModule(pairs, validation=pairs, batch_size=4, max_length=64)
    module = LoudDPO(PaLM(num_tokens=259, dim=64, depth=2, heads=2, dim_head=32), beta=0.1)
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1, accelerator="cpu", logger=False)
    trainer.fit(module, data)
    return trainer


if __name__ == "__main__":
    print({name: float(value) for name, value in main(sys.argv[1]).callback_metrics.items()})
