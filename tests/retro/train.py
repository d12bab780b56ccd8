"""The script of one rank of a distributed test: train and validate RETRO on an existing database, and generate."""

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.retro.datamodule import RETRODataModule
from lightning_align.retro.decoding import RetrievalDecoder
from lightning_align.retro.model import RETRO
from lightning_align.retro.module import RETROModule
from tests.distributed.train import STRATEGIES, full
from tests.retro.toys import ToyRetriever, decoder_of, reusing, tiny_retro
from tests.toys import tiny_palm

SIZE = 8
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def build(kind: str) -> RETRO:
    """Build a model with an encoder of its own, or one that reuses its decoder."""
    # In float64: in float32, kernels that differ by batch size and thread count move the weights by more than 1e-6.
    if kind == "own":
        return tiny_retro(decoder=tiny_palm(num_tokens=259, depth=3), chunk_size=SIZE, dtype=torch.float64)
    return reusing(decoder_of("llama", vocab_size=259).train(), chunk_size=SIZE).train()


def run(strategy: Any, devices: int, database: str, folder: Path, kind: str) -> dict[str, Any]:
    """Run two optimizer steps on the same global batches of six and three windows, validate both arms, and generate."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    module = RETROModule(build(kind), optimizer=SGD)
    data = RETRODataModule(database, num_chunks=3, batch_size=6 // devices, eval_num_neighbors=3)
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    decoder = RetrievalDecoder(module.policy, ToyRetriever(SIZE), num_neighbors=2)
    prompts = [[1, *range(4, 17)], [4]][: 1 + trainer.global_rank]
    texts = [r[0].tokens for r in generate(decoder, prompts, GenerationConfig(max_new_tokens=12, temperature=0), eos_id=5)]
    return {"state": full(module.policy), "metrics": metrics, "texts": texts}


def main(name: str, database: str, folder: Path, kind: str) -> None:
    warnings.filterwarnings("error", message=".*sync_dist")
    result = run(STRATEGIES[name]("retro"), 2, database, folder, kind)
    torch.save(result, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
