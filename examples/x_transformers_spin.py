"""Self-play with a model of x-transformers and the callbacks of this library. A model that returns only logits is enough.

python examples/x_transformers_spin.py rows.jsonl
"""

import sys

import lightning as L
import torch
from x_transformers import Decoder, TransformerWrapper

from lightning_align import GenerationConfig, SelfPlayGeneration, SPINDataModule, SPINModule


def main(rows: str, iterations: int = 2, folder: str = "generations") -> L.Trainer:
    """Train with self-play and return the trainer."""
    torch.manual_seed(0)
    layers = Decoder(dim=64, depth=2, heads=2, rotary_pos_emb=True)
    model = TransformerWrapper(num_tokens=259, max_seq_len=128, attn_layers=layers, use_abs_pos_emb=False)
    module = SPINModule(model, beta=0.1, generation=GenerationConfig(max_new_tokens=8))
    data = SPINDataModule(rows, batch_size=4, max_length=64)
    loop = SelfPlayGeneration(iterations=iterations, epochs=1, folder=folder)
    trainer = L.Trainer(max_epochs=-1, callbacks=[loop], log_every_n_steps=1, accelerator="cpu", logger=False)
    trainer.fit(module, data)
    return trainer


if __name__ == "__main__":
    print({name: float(value) for name, value in main(sys.argv[1]).callback_metrics.items()})
