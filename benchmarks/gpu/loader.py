"""What the input costs a training step: pinned memory and loader workers, and what fused AdamW saves."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.common import gpu, gpu_models
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.models.palm import PaLM


def rows(path: Path, count: int, words: int) -> str:
    """Preference pairs of many lengths."""
    lines = []
    for number in range(count):
        length = words // 4 + number * 37 % words
        chosen, rejected = (" ".join(f"{(number * 3 + i) % 997 + 1000 * k}" for i in range(length)) for k in (1, 2))
        lines.append(json.dumps({"prompt": f"Count from {number}:", "chosen": f" {chosen}", "rejected": f" {rejected}"}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class Clock(Callback):
    """Times the steps after the first ones, and how long the host spends between the end of a step and the next batch."""

    def __init__(self, session: gpu.Session, skipped: int) -> None:
        self.session, self.skipped = session, skipped
        self.fetching, self.ended, self.start, self.seconds, self.steps = 0.0, 0.0, 0.0, 0.0, 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch is there."""
        if batch_idx > self.skipped:
            self.fetching += time.perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step was submitted."""
        if batch_idx == self.skipped:
            self.session.synchronize()
            self.start = time.perf_counter()
        elif trainer.is_last_batch:
            self.session.synchronize()
            self.seconds, self.steps = time.perf_counter() - self.start, batch_idx - self.skipped
        self.ended = time.perf_counter()


def input_row(session: gpu.Session, folder: Path, data: str, *, workers: int, pinned: bool, sizes: dict[str, int]) -> None:
    """One row: an epoch with a loader."""
    pairs = DPODataModule(
        data, batch_size=sizes["batch"], max_length=sizes["length"], num_workers=workers, cache_dir=str(folder / "cache")
    )
    torch.manual_seed(0)
    shape = {"dim": sizes["dim"], "depth": sizes["depth"], "heads": sizes["heads"], "dim_head": sizes["dim"] // sizes["heads"]}
    clock = Clock(session, 1 if session.dry else 10)
    trainer = L.Trainer(
        accelerator="cpu" if session.dry else "cuda",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with mock.patch("lightning_align.training.loading.PINNED", ("cuda",) if pinned else ()):
        trainer.fit(DPOModule(PaLM(num_tokens=259, **shape)), datamodule=pairs)
    session.add(
        "Input",
        {
            "workers": workers,
            "pinned": pinned,
            "steps": clock.steps,
            "ms per step": 1e3 * clock.seconds / clock.steps,
            "of it between steps on the host": 1e3 * clock.fetching / clock.steps,
        },
    )


def adamw(session: gpu.Session) -> None:
    """Time of an AdamW step over the weights of a Llama, by implementation."""
    size = "tiny" if session.dry else "1B"
    from transformers import LlamaConfig, LlamaForCausalLM

    config = gpu_models.configuration(size, 64 if session.dry else gpu_models.VOCABULARY)
    config.pop("model_type")
    with session.device:
        model = LlamaForCausalLM(LlamaConfig(**config))
    parameters = list(model.parameters())
    number = sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ways = {"one by one": ("foreach", False), "foreach": ("foreach", True), "fused": ("fused", True)}
    for name, (option, value) in ways.items():
        with session.part(f"AdamW, {name}"):
            optimizer = torch.optim.AdamW(parameters, lr=1e-9, **{option: value})  # type: ignore[arg-type]
            step: Callable[[], object] = optimizer.step
            seconds = session.median(step, rounds=10)
            moved = 28 * number / seconds / 1e12  # reads weight, gradient and two moments; writes three of them
            session.add("AdamW", {"way": name, "weights": number, "ms per step": 1e3 * seconds, "TB/s": moved})
            del optimizer, step


def main() -> None:
    """Measure and print."""
    arguments = gpu.parse(gpu.parser(__doc__))
    session = gpu.Session(
        "loader",
        "Input and optimizer",
        "DPO of a PaLM in bf16-mixed through Trainer and data module, an epoch per row. Time on the host between steps "
        "includes what the Trainer does there.",
        arguments,
    )
    sizes = (
        {"batch": 4, "length": 64, "dim": 16, "depth": 1, "heads": 2, "count": 24, "words": 12}
        if session.dry
        else {"batch": 16, "length": 1024, "dim": 768, "depth": 12, "heads": 12, "count": 16 * 110, "words": 200}
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = rows(folder / "pairs.jsonl", sizes["count"], sizes["words"])
        ways = ((0, False), (0, True)) if session.dry else ((0, False), (0, True), (2, True), (4, True), (4, False))
        for workers, pinned in ways:
            with session.part(f"{workers} workers, {'pinned' if pinned else 'pageable'} memory", needs=40):
                input_row(session, folder, data, workers=workers, pinned=pinned, sizes=sizes)
    with session.part("AdamW"):
        adamw(session)
    session.finish()


if __name__ == "__main__":
    main()
