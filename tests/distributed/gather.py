"""What one rank of a test of FSDP2 under mixed precision does: count collectives by dtype, and the weights that stay."""

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.scoring.sums import response_logprobs
from lightning_align.sft.module import SFTModule
from tests.distributed.train import DPO_BATCH, LIMIT, SFT_BATCH, SGD, full
from tests.toys import split, tiny_palm

# What FSDP2 calls, in newer and older versions of torch.
NAMES = {
    "gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce": ("reduce_scatter_single", "reduce_scatter_tensor"),
}


class Casts(TorchDispatchMode):
    """Keeps weak references to the matrices that were cast from float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cast = func._schema.name == "aten::_to_copy" and out.ndim == 2
        if cast and args[0].dtype is torch.float32 and out.dtype is torch.bfloat16:
            self.found.append((weakref.ref(out), out.numel()))
        return out


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count gathers and reductions of FSDP2 by dtype."""
    seen: Counter[str] = Counter()

    def counted(kind: str, real: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            given = kwargs.get("input_tensor", kwargs.get("input", args[1] if len(args) > 1 else None))
            seen[f"{kind} {given.dtype}"] += 1
            return real(*args, **kwargs)

        return collective

    with ExitStack() as stack:
        for kind, names in NAMES.items():
            name = next(name for name in names if hasattr(dist, name))
            stack.enter_context(mock.patch.object(_fsdp_collectives.dist, name, counted(kind, getattr(dist, name))))
        yield seen


def run(
    method: str, precision: Any, devices: int, folder: Path, *, strategy: Any = None, accumulate: int = 2
) -> dict[str, Any]:
    """Train a step of the eight rows, in micro-batches. Returns weights, losses, collectives, and what stays in memory."""
    sharded = ModelParallelStrategy(devices, 1, process_group_backend="gloo", timeout=LIMIT)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy or sharded,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    L.seed_everything(0, verbose=False)
    module: Any = SFTModule(tiny_palm(), optimizer=SGD) if method == "sft" else DPOModule(tiny_palm(), optimizer=SGD)
    batch = SFT_BATCH if method == "sft" else DPO_BATCH
    parts = split(batch, 8 // accumulate // devices)[trainer.global_rank :: devices]
    with counting() as seen:
        trainer.fit(module, DataLoader(parts, batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    with trainer.precision_plugin.forward_context(), Casts() as casts:
        scored = response_logprobs(module.policy, SFT_BATCH).sums
    gc.collect()
    alive = sum(size for ref, size in casts.found if ref() is not None)
    outside = response_logprobs(module.policy, SFT_BATCH).sums  # a callback may run outside of autocast
    texts = [r[0].tokens for r in generate(module.policy, [[1, 2, 3]], GenerationConfig(max_new_tokens=4, temperature=0))]
    total = sum(p.numel() for p in module.policy.parameters())
    state = full(module.policy)
    return {
        "state": state,
        "metrics": metrics,
        "collectives": dict(seen),
        "alive": alive / total,
        "scored": scored.detach(),
        "outside": outside.detach(),
        "texts": texts,
        "dtypes": sorted({str(value.dtype) for value in state.values()}),
    }


def main(folder: Path) -> None:
    results = {
        (method, precision): run(method, precision, 2, folder)
        for method in ("sft", "dpo")
        for precision in ("32-true", "bf16-mixed", "bf16-true")
    }
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
