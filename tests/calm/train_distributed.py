"""The script of a rank in the distributed test of CALM: train an epoch, resume for a second one, and save the results."""

import functools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_align.calm.module import CALMModule
from lightning_align.calm.spec import Augment
from lightning_align.generation.sampler import GenerationConfig, generate
from tests.calm.toys import SMALL, palms
from tests.distributed.train import STRATEGIES, full
from tests.toys import split, token_batch

BATCH = token_batch([2, 1, 3, 2, 1, 2, 3, 1], [9, 8, 1, 7, 1, 1, 2, 1])
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def run(strategy: Any, devices: int, folder: Path, *, recompute: bool = False) -> dict[str, Any]:
    def trainer(epochs: int) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
        options = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
        return L.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy(),
            max_epochs=epochs,
            use_distributed_sampler=False,
            default_root_dir=folder,
            **quiet,
            **options,
        )

    def module() -> CALMModule:
        L.seed_everything(0, verbose=False)
        anchor, augment = palms(torch.float64)
        begin = str(folder / "connections.safetensors")
        augments = [Augment(augment, num_connections=2)]
        return CALMModule(
            anchor, augments, connection=SMALL, connections_from=begin, optimizer=SGD, activation_checkpointing=recompute
        )

    first = trainer(1)
    parts = split(BATCH, 4 // devices)[first.global_rank :: devices]
    loader: DataLoader[Any] = DataLoader(parts, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    first.fit(module(), loader, loader)
    first.save_checkpoint(folder / f"calm-{devices}.ckpt")
    subject = module()
    second = trainer(2)
    second.fit(subject, loader, loader, ckpt_path=folder / f"calm-{devices}.ckpt")
    metrics = {name: float(value) for name, value in second.callback_metrics.items() if name in ("val/loss", "train/grad_norm")}
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    texts = [r[0].tokens for r in generate(subject.policy, [[1, 2, 3], [4]], config, eos_id=5)]
    return {"state": full(subject.policy), "metrics": metrics, "texts": texts, "world": second.world_size}


if __name__ == "__main__":
    name, target, recompute = sys.argv[1], Path(sys.argv[2]), bool(sys.argv[3])
    result = run(lambda: STRATEGIES[name]("calm"), 2, target, recompute=recompute)
    torch.save(result, target / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
