"""Where training, validation and prediction wait for the device, in every method and option.

The models are tiny: what counts is how often the host waits. CUDA itself reports the waits (`set_sync_debug_mode`), from the
end of the first step on, so copies of the batches count too.
"""

import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.common import gpu

FEW = ("sft", "dpo")
"""The cases of a dry run."""


def place() -> str:
    """The innermost line of the package on the stack, or else the innermost one outside of torch and of this script."""
    other = "torch"
    for frame in reversed(traceback.extract_stack()):
        _, found, path = frame.filename.rpartition("/lightning_align/")
        if found:
            return f"{path}:{frame.lineno} {frame.name}"
        if other == "torch" and not any(part in frame.filename for part in ("/torch/", "/warnings.py", __file__)):
            other = f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno}"
    return other


class Waits(Callback):
    """Counts the waits of each step after the first, by line.

    Args:
        dry: Whether there is no CUDA. Nothing is counted then.
    """

    def __init__(self, dry: bool) -> None:
        self.dry, self.found = dry, Counter[str]()
        self.counts: dict[str, list[Counter[str]]] = {"step": [], "validation": [], "prediction": []}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect the warnings of CUDA within a ``with`` block. Other warnings are dropped."""

        def heard(message: Any, *_: Any, **__: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                self.found[place()] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = heard
            try:
                yield
            finally:
                self._mode("default")

    def _mode(self, mode: str) -> None:
        if not self.dry:
            torch.cuda.set_sync_debug_mode(mode)

    def _next(self, kind: str, *, first: bool) -> None:
        """End a step. What came before the end of the first one is not counted."""
        if not first:
            self.counts[kind].append(self.found.copy())
        self.found.clear()
        self._mode("warn")

    def _stop(self) -> None:
        self._mode("default")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        self._next("step", first=batch_idx == 0)
        if trainer.is_last_batch:
            self._stop()

    def on_validation_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        """Count. The first batch of an epoch fetches what the next ones have."""
        self._next("validation", first=rest[3] == 0)

    def on_validation_end(self, *_: Any) -> None:
        """Stop."""
        self._stop()

    def on_predict_start(self, *_: Any) -> None:
        """Start. The module is on its device by then."""
        self._next("prediction", first=True)

    def on_predict_batch_end(self, *_: Any) -> None:
        """Count."""
        self._next("prediction", first=False)

    def on_predict_end(self, *_: Any) -> None:
        """Stop."""
        self._stop()


def run(case: Any, folder: Path, dry: bool, precision: str, epochs: int) -> Waits:
    """Fit, validate and predict."""
    module, data, callbacks = case(folder)
    waits = Waits(dry)
    trainer = L.Trainer(
        accelerator="cpu" if dry else "cuda",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=epochs,
        callbacks=[*callbacks, waits],
        default_root_dir=folder,
        limit_val_batches=2,
        limit_predict_batches=2,
        num_sanity_val_steps=0,
        log_every_n_steps=1000,
        check_val_every_n_epoch=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with waits.listening():
        trainer.fit(module, datamodule=data)
        trainer.validate(module, datamodule=data, verbose=False)
        trainer.predict(module, datamodule=data)
    return waits


def main() -> None:
    """Measure and print."""
    made = gpu.parser(__doc__)
    made.add_argument("--cases", nargs="+", help="names of cases; default: all, or two in a dry run")
    made.add_argument("--precision", default="bf16-mixed")
    arguments = gpu.parse(made)
    from tests.devices.test_steps import BASIC, OPTIONS

    session = gpu.Session(
        "waits",
        "Waits for the device",
        f"Waits of the host as CUDA reports them, through the Trainer in {arguments.precision}: the last training step, the "
        "last validation batch, and the last of two predicted batches. The budget is that of the tests on a pretended device.",
        arguments,
    )
    cases = BASIC | OPTIONS
    lines: Counter[str] = Counter()
    for name in arguments.cases or (FEW if session.dry else cases):
        case, budget = cases[name]
        with session.part(name, needs=10), tempfile.TemporaryDirectory() as folder:
            waits = run(case, Path(folder), session.dry, arguments.precision, budget.epochs)
            last = {kind: found[-1] for kind, found in waits.counts.items() if found}
            number = {kind: sum(last[kind].values()) if kind in last else "none ran" for kind in waits.counts}
            for kind, found in last.items():
                lines.update({f"{name}, {kind}: {line}": count for line, count in found.items()})
            session.add(
                "Waits",
                {
                    "case": name,
                    "per step": number["step"],
                    "budget": budget.step,
                    "per validation batch": number["validation"],
                    "its budget": budget.validation,
                    "per predicted batch": number["prediction"],
                    "budget of it": budget.prediction,
                },
            )
            session.note("lines", dict(lines))
    for line, number in lines.most_common(40):
        session.add("Lines that wait", {"where": line, "waits": number})
    session.finish()


if __name__ == "__main__":
    main()
