"""DPO of a LitGPT model. A model that returns only logits is enough.

LitGPT 0.5.13 requires older releases of huggingface-hub and jsonargparse than transformers 5 and this library. Its models use
neither of them, so install it without its dependencies: pip install --no-deps litgpt

python examples/litgpt_dpo.py pairs.jsonl
"""

import sys

import lightning as L
import torch
from litgpt import GPT, Config

from lightning_align import DPODataModule, DPOModule


def main(pairs: str, steps: int = 12) -> L.Trainer:
    """Train a small model and return the trainer, which has the logged metrics."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "intermediate_size": 128}
    model = GPT(Config(block_size=128, vocab_size=259, padded_vocab_size=259, bias=False, **sizes))
    module = DPOModule(model, beta=0.5, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    data = DPODataModule(pairs, batch_size=4, max_length=64)
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1, accelerator="cpu", logger=False)
    trainer.fit(module, data)
    return trainer


if __name__ == "__main__":
    print({name: float(value) for name, value in main(sys.argv[1]).callback_metrics.items()})
