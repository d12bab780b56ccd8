"""Short fits of SFTModule and DPOModule that several tests share."""

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule
from lightning_align.sft.module import SFTModule
from tests.toys import (
    preference_batch,
    split,
    tiny_palm,
    token_batch,
)

SGD = functools.partial(torch.optim.SGD, lr=0.05)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)
# Response lengths that differ much between the halves: a mean of means is then not the mean.
SFT_BATCH = token_batch([2, 1, 3, 2, 1, 2, 3, 1], [9, 8, 1, 7, 1, 1, 2, 1])
DPO_BATCH = preference_batch(8)
MODULES: dict[str, Any] = {
    "sft": lambda **given: SFTModule(given.pop("backbone", None) or tiny_palm(), **given),
    "dpo": lambda **given: DPOModule(given.pop("backbone", None) or tiny_palm(), **{"sft_weight": 0.3, **given}),
}
BATCHES: dict[str, Any] = {"sft": SFT_BATCH, "dpo": DPO_BATCH}
METHODS = pytest.mark.parametrize("method", ["sft", "dpo"])


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def trainer(folder: Path, **arguments: Any) -> L.Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return L.Trainer(**{**defaults, **quiet, "log_every_n_steps": 1, **arguments})


def fit(method: str, folder: Path, *, size: int = 8, given: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """Train on the method's eight rows cut into micro-batches of a size; every micro-batch of an epoch accumulates."""
    module = MODULES[method](optimizer=SGD, **(given or {}))
    batches = split(BATCHES[method], size)
    arguments = {"max_epochs": 2, "accumulate_grad_batches": len(batches), **arguments}
    trainer(folder, **arguments).fit(module, loader(batches))
    return module


class Gradients(Callback):
    """Keeps the gradients that the optimizer sees, and the metrics of the step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def keep(*_: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

        trainer.optimizers[0].register_step_post_hook(keep)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def hand_loss(method: str, policy: nn.Module, reference: nn.Module, batch: Any) -> Tensor:
    """The loss of the whole batch, with plain log-softmax on full logits, with its graph."""

    def sums(model: nn.Module, rows: Any) -> tuple[Tensor, Tensor]:
        logps = model(rows["tokens"])[:, :-1].log_softmax(-1).gather(2, rows["tokens"][:, 1:, None]).squeeze(2)
        targets = rows["targets"][:, 1:]
        return (logps * targets).sum(1), targets.sum(1)

    if method == "sft":
        total, counts = sums(policy, batch)
        return -total.sum() / counts.sum()
    (w, nw), (l, _) = sums(policy, batch["chosen"]), sums(policy, batch["rejected"])  # noqa: E741
    (rw, _), (rl, _) = sums(reference, batch["chosen"]), sums(reference, batch["rejected"])
    return (-nn.functional.logsigmoid(0.1 * ((w - rw) - (l - rl))) - 0.3 * w / nw).mean()
