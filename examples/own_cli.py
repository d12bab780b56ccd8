"""Your own command line, with your own module in addition to those of this library.

python examples/own_cli.py fit --model Unigram --data SFTDataModule --data.train rows.jsonl --trainer.max_steps 10
python examples/own_cli.py fit --model SFTModule --model.backbone lightning_align.PaLM ...
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

import lightning_align


class Unigram(L.LightningModule):
    """A custom module that learns only the frequencies of tokens, on batches of this library."""

    def __init__(self, vocabulary: int = 259, lr: float = 0.1) -> None:
        """Start with equal probabilities for all tokens.

        Args:
            vocabulary: The number of tokens.
            lr: The learning rate.
        """
        super().__init__()
        self.policy = Frequencies(vocabulary)
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the mean loss over the tokens of the responses."""
        sums, counts = lightning_align.response_logprobs(self.policy, batch)
        loss = -sums.sum() / counts.sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam for all parameters."""
        return torch.optim.Adam(self.parameters(), self.lr)


class Frequencies(nn.Module):
    """A language model with one weight per token."""

    def __init__(self, vocabulary: int) -> None:
        """Start with equal probabilities for all tokens.

        Args:
            vocabulary: The number of tokens.
        """
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, N) to logits (B, N, V)."""
        return self.logits.expand(*tokens.shape, -1)


def main(args: list[str] | None = None) -> LightningCLI:
    """Parse the arguments and run the command."""
    for name in lightning_align.__all__:
        getattr(lightning_align, name)  # load all classes, so that the command line finds them by their bare names
    return LightningCLI(L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, args=args)


if __name__ == "__main__":
    main()
