"""16-mixed (steps skipped by the loss scale), and curves of bf16-mixed, bf16-true and 16-mixed against float32."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.common import gpu
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.models.palm import PaLM
from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.sft.module import SFTModule

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


def texts(folder: Path, count: int) -> dict[str, str]:
    """Sums with their right and wrong answers, as rows of both methods."""
    draw = random.Random(0)
    responses, pairs = [], []
    for _ in range(count):
        a, b = draw.randrange(100), draw.randrange(100)
        prompt, right, wrong = f"{a} + {b} =", f" {a + b}.", f" {a + b + draw.choice((-10, -1, 1, 10))}."
        responses.append({"prompt": prompt, "response": right})
        pairs.append({"prompt": prompt, "chosen": right, "rejected": wrong})
    paths = {}
    for name, lines in (("sft", responses), ("dpo", pairs)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths[name] = str(path)
    return paths


class Curve(Callback):
    """Keeps the logged metrics of each step, and the scale of the loss."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.scales: list[float] = []
        self.skipped = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps of the optimizer that happen."""
        self._happened = 0

        def happened(*_: Any) -> None:
            self._happened += 1

        trainer.optimizers[0].register_step_post_hook(happened)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the metrics of the step."""
        for name in ("train/loss", "train/rewards/margins"):
            if name in trainer.callback_metrics:
                self.values.setdefault(name, []).append(float(trainer.callback_metrics[name]))
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            self.scales.append(float(scaler.get_scale()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps that were skipped."""
        self.skipped = trainer.global_step - self._happened


def train(session: gpu.Session, method: str, precision: str, data: str, folder: Path, sizes: dict[str, int]) -> Curve:
    """Train with the seed and the data of the other precisions."""
    L.seed_everything(0, verbose=False)
    palm = PaLM(
        num_tokens=259, dim=sizes["dim"], depth=sizes["depth"], heads=sizes["heads"], dim_head=sizes["dim"] // sizes["heads"]
    )
    shared: dict[str, Any] = {"batch_size": sizes["batch"], "cache_dir": str(folder / "cache")}
    module, loader = (
        (SFTModule(palm), SFTDataModule(data, **shared))
        if method == "sft"
        else (DPOModule(palm, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4)), DPODataModule(data, **shared))
    )
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu" if session.dry else "cuda",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=sizes["steps"],
        max_epochs=-1,
        callbacks=[curve],
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=loader)
    return curve


def main() -> None:
    """Measure and print."""
    arguments = gpu.parse(gpu.parser(__doc__))
    session = gpu.Session(
        "precision",
        "Precisions",
        "The same weights, rows and seeds in each precision. The loss is the mean over the last tenth of the steps. The "
        "largest gap is that of means over a tenth of the steps from those of float32.",
        arguments,
    )
    sizes = (
        {"dim": 16, "depth": 1, "heads": 2, "batch": 4, "steps": 10, "count": 64}
        if session.dry
        else {"dim": 512, "depth": 8, "heads": 8, "batch": 64, "steps": 300, "count": 64 * 320}
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = texts(folder, sizes["count"])
        for method, data in paths.items():
            curves: dict[str, Curve] = {}
            for precision in PRECISIONS:
                if session.dry and precision == "16-mixed":
                    continue  # Lightning scales losses on CUDA only
                with session.part(f"{method}, {precision}", needs=30):
                    curve = curves[precision] = train(session, method, precision, data, folder, sizes)
                    session.note(f"{method}, {precision}", curve.values)
                    bins = max(1, sizes["steps"] // 10)
                    row: dict[str, Any] = {"method": method, "precision": precision}
                    for key in ("train/loss", "train/rewards/margins"):
                        values = curve.values.get(key)
                        if not values:
                            continue
                        means = [sum(values[i : i + bins]) / bins for i in range(0, len(values) - bins + 1, bins)]
                        row[f"{key}, last"] = means[-1]
                        if "32-true" in curves and precision != "32-true" and key in curves["32-true"].values:
                            base = curves["32-true"].values[key]
                            truth = [sum(base[i : i + bins]) / bins for i in range(0, len(base) - bins + 1, bins)]
                            row[f"{key}, largest gap"] = max(abs(a - b) for a, b in zip(means, truth, strict=True))
                    row["skipped steps"] = curve.skipped
                    row["first and last scale"] = f"{curve.scales[0]:g}, {curve.scales[-1]:g}" if curve.scales else "none"
                    session.add("Curves", row)
    session.finish()


if __name__ == "__main__":
    main()
