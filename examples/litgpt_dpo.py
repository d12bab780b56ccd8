"""DPO of a LitGPT model: it gives logits and nothing else, which is enough.

LitGPT 0.5.13 asks for releases of huggingface-hub and jsonargparse from before those that transformers 5 and this library
run with, and its models need neither: pip install --no-deps litgpt

python examples/litgpt_dpo.py pairs.jsonl
"""

import sys

import lightning as L
import torch
from litgpt import GPT, Config

from lightning_align import DPODataModule, DPOModule


def main(pairs: str, steps: int = 12) -> L.Trainer:
    """Train; return the trainer, which knows what was logged."""
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
