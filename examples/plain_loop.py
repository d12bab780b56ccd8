"""A data module of this library in your own training loop. It supplies tokens, masks and batches without a Trainer.

python examples/plain_loop.py rows.jsonl
"""

import sys

import torch

from lightning_align import PaLM, SFTDataModule, response_logprobs


def main(rows: str, epochs: int = 1) -> list[float]:
    """Train a small model and return the loss of each step, in nats per token."""
    data = SFTDataModule(rows, batch_size=4, max_length=64)
    data.setup("fit")
    torch.manual_seed(0)
    model = PaLM(num_tokens=data.tokenizer.vocab_size, dim=64, depth=2, heads=2, dim_head=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(epochs):
        for batch in data.train_dataloader():
            sums, counts = response_logprobs(model, batch)
            loss = -sums.sum() / counts.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, value in enumerate(main(sys.argv[1]), start=1):
        print(f"step {number}: {value:.3f}")
