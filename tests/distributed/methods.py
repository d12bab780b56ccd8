"""What one rank of a sharded run does: train each method with a precision, and log its collectives."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_align.calm.model import CALM
from lightning_align.calm.module import CALMModule
from lightning_align.calm.spec import Augment
from lightning_align.dpo.module import DPOModule
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models import gathered
from lightning_align.retro.model import NeighborTokens
from lightning_align.retro.module import RETROModule
from lightning_align.sft.module import SFTModule
from tests.calm.toys import SMALL, connect, palms
from tests.distributed.collectives import logged
from tests.distributed.train import DPO_BATCH, SFT_BATCH, SGD, STRATEGIES, full
from tests.retro.toys import tiny_retro, tokens_and_neighbors
from tests.toys import split, tiny_palm

METHODS = ("sft", "dpo", "calm", "retro", "dpo_calm")
PRECISIONS = ("32-true", "bf16-mixed")


def retro_batches(size: int) -> list[Any]:
    tokens, neighbors = tokens_and_neighbors(8, 13, size=4)
    mask = torch.arange(13) < torch.tensor([13, 9, 13, 6, 13, 8, 12, 7])[:, None]
    targets = mask.clone()
    targets[:, 0] = False
    rows = split({"tokens": tokens * mask, "mask": mask, "targets": targets}, size)
    for index, row in enumerate(rows):
        part = slice(index * size, (index + 1) * size)
        row["neighbors"] = NeighborTokens(neighbors.tokens[part], neighbors.mask[part])
    return rows


def build(method: str, size: int, *, recompute: bool) -> tuple[Any, list[Any]]:
    """The module of a method, and its eight rows in parts of a size."""
    options: Any = {"optimizer": SGD, "activation_checkpointing": recompute}
    if method == "sft":
        return SFTModule(tiny_palm(), **options), split(SFT_BATCH, size)
    if method == "dpo":
        return DPOModule(tiny_palm(tie_embeddings=False), **options), split(DPO_BATCH, size)
    if method == "retro":
        model = tiny_retro(chunk_size=4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter *= 0.5  # with larger weights its gradient multiplies rounding by a hundred
        return RETROModule(model, vary_neighbors=False, **options), retro_batches(size)
    anchor, augment = palms(torch.float32)
    if method == "calm":
        return CALMModule(anchor, [Augment(augment, num_connections=2)], connection=SMALL, **options), split(SFT_BATCH, size)
    assert method == "dpo_calm"
    composition = connect(CALM(anchor, Augment(augment, num_connections=2), connection=SMALL))
    return DPOModule(composition, **options), split(DPO_BATCH, size)


def train(method: str, precision: Any, strategy: Any, devices: int, folder: Path) -> dict[str, Any]:
    """Train two optimizer batches of two micro-batches; the weights before and after, and the collectives of the run."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=precision,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        default_root_dir=folder,
    )
    L.seed_everything(0, verbose=False)
    module, parts = build(method, 4 // devices, recompute=method in ("sft", "retro", "dpo_calm"))
    loader: DataLoader[Any] = DataLoader(parts[trainer.global_rank :: devices], batch_size=None)  # type: ignore[arg-type]
    start: dict[str, Tensor] = {}
    configured = module.configure_model

    def configure() -> None:
        torch.manual_seed(3)  # a sharded strategy has seeded again
        configured()
        if not start:
            start.update(full(module.policy))

    module.configure_model = configure
    with logged() as calls:
        trainer.fit(module, loader, loader)
    return {"start": start, "state": full(module.policy), "calls": [tuple(call) for call in calls], "module": module}


def tokens_without_gathers(policy: Any) -> dict[str, Any]:
    """The collectives of two generations that differ by eight tokens, with gathered weights and without."""
    found: dict[str, Any] = {}
    share = gathered.GATHERED_SHARE
    for name, limit in (("gathered", share), ("by block", 0.0)):
        gathered.GATHERED_SHARE = limit
        counts, texts = [], []
        for number in (16, 8):
            config = GenerationConfig(max_new_tokens=number, temperature=0)
            with logged() as calls:
                prompts = [[1, 2, 3], [4]][: 1 + torch.distributed.get_rank()]
                texts.append([answers[0].tokens for answers in generate(policy, prompts, config)])
            counts.append(len(calls))
        found[name] = {"counts": counts, "texts": texts}
    gathered.GATHERED_SHARE = share
    return found


def main(cases: str, folder: Path) -> None:
    results: dict[str, Any] = {}
    for case in cases.split(","):
        method, precision = case.split("/")
        result = train(method, precision, STRATEGIES["fsdp2"]("dpo"), 2, folder)
        module = result.pop("module")
        if method == "sft":
            result["generation"] = tokens_without_gathers(module.policy)
            # Training goes on after it as before.
            assert any(isinstance(weight, torch.distributed.tensor.DTensor) for weight in module.policy.blocks.parameters())
        results[case] = result
    torch.save(results, folder / f"{torch.distributed.get_rank()}-methods.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
