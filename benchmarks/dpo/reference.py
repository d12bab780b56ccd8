"""References: whether a frozen one stays the same bit for bit over 1,000 steps, and the size of checkpoints."""

import argparse
import functools
import logging
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks import common
from lightning_align.dpo.batch import concatenate
from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.palm import PaLM
from lightning_align.references.update import ReferenceUpdate
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch

VOCABULARY, PAIRS = 64, 4
STEPS = 1_000
SIZES = {"num_tokens": 4_096, "dim": 256, "depth": 4, "heads": 4}
LORA = LoRAConfig(rank=4, targets=["in_proj"])


def short_pairs() -> list[PreferenceBatch]:
    """Two batches of short pairs, so that a thousand steps take seconds."""
    draw = random.Random(0)

    def ids(number: int) -> list[int]:
        return [draw.randrange(2, VOCABULARY) for _ in range(number)]

    pairs = [common.Pair(ids(4), [*ids(5), common.EOS], [*ids(7), common.EOS]) for _ in range(2 * PAIRS)]
    return common.batches(pairs, PAIRS)


def fit(folder: str, steps: int, size: dict[str, int], **given: Any) -> DPOModule:
    """Train for a number of steps on the same two batches."""
    torch.manual_seed(0)
    module = DPOModule(PaLM(**size), optimizer=functools.partial(torch.optim.AdamW, lr=1e-3), **given)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ReferenceUpdate(alpha=0.1, every=1)] if given.get("reference") == "moving" else [],
    )
    trainer.fit(module, DataLoader(short_pairs(), batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    return module


def frozen(folder: str, **given: Any) -> dict[str, str]:
    """Compare the log-probs of a reference before and after training."""
    size = {"num_tokens": VOCABULARY, "dim": 16, "depth": 1, "heads": 2}
    batch = concatenate(short_pairs()[0])
    torch.manual_seed(0)
    with torch.no_grad():
        before = response_logprobs(PaLM(**size), batch).sums
    module = fit(folder, STEPS, size, **given)
    with torch.no_grad():
        policy = response_logprobs(module.policy, batch).sums
    after = module.reference.logprobs(module.policy, batch).sums
    return {
        "steps": str(module.trainer.global_step),
        "change of the policy, nats per response": f"{float((policy - before).abs().mean()):.1f}",
        "reference after training": "bitwise equal"
        if torch.equal(before, after)
        else f"changed by {float((after - before).abs().max()):.2g}",
    }


def size_of(folder: str, **given: Any) -> tuple[int, int]:
    """Size of a checkpoint, and of the trained parameters with their optimizer state, in bytes."""
    module = fit(folder, 2, SIZES, **given)
    path = Path(folder) / "size.ckpt"
    module.trainer.save_checkpoint(path)
    states = [value for state in module.trainer.optimizers[0].state.values() for value in state.values()]
    tensors = [*(p for p in module.policy.parameters() if p.requires_grad), *states]
    return path.stat().st_size, sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    """Parse the command line, measure, print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    common.heading(
        "References and checkpoints",
        f"References: a PaLM of width 16, AdamW 0.001, {PAIRS} short pairs per step. Checkpoints: width {SIZES['dim']}, depth "
        f"{SIZES['depth']}, vocabulary {SIZES['num_tokens']:,}, AdamW, float32; adapters of rank {LORA.rank} on the input "
        "projections.",
    )
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, dict[str, Any]] = {
            "frozen": {},
            "stored": {"reference": "stored", "reference_cache": folder},
            "adapters off": {"lora": LORA},
        }
        rows = [{"reference": name, **frozen(folder, **given)} for name, given in kinds.items()]
        print(common.table(rows))
        kinds = {
            "frozen": {},
            "moving": {"reference": "moving"},
            "adapters off": {"lora": LORA},
            "moving adapters": {"lora": LORA, "reference": "moving"},
        }
        sizes = {name: size_of(folder, **given) for name, given in kinds.items()}
    full = sizes["frozen"][0]
    print(
        common.table(
            [
                {
                    "reference": name,
                    "checkpoint, MiB": f"{size / common.MIB:.2f}",
                    "checkpoint / trained parameters and optimizer state": f"{size / own:.3f}",
                    "checkpoint / full run": f"{size / full:.3f}",
                }
                for name, (size, own) in sizes.items()
            ]
        )
    )
    same = all(row["reference after training"] == "bitwise equal" for row in rows)
    ratio, lora = full / sizes["frozen"][1], sizes["adapters off"][0] / full
    print(
        common.table(
            [
                common.claim(f"frozen references after {STEPS:,} steps", "bitwise equal", "yes" if same else "no", same),
                common.claim("checkpoint / policy and optimizer state", "≤ 1.01", f"{ratio:.4f}", ratio <= 1.01),
                common.claim("checkpoint of a LoRA run / full run", "≤ 0.03", f"{lora:.4f}", lora <= 0.03),
            ]
        )
    )


if __name__ == "__main__":
    main()
