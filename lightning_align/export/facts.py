"""What a model card says about a run: its data, its settings and its final metrics."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from lightning_align.data.ledger import Ledger
from lightning_align.data.mixture import parts_of
from lightning_align.export.card import shortened
from lightning_align.export.papers import METHODS

STAGES = ("train", "validation")


def method_of(module: L.LightningModule) -> str:
    """Return the class name of a module, or of the module of this package that it is derived from."""
    names = [kind.__name__ for kind in type(module).__mro__]
    return next((name for name in names if name in METHODS), names[0])


def _counted(names: str, ledgers: list[tuple[int, int]]) -> str:
    kept, rows = (sum(counts) for counts in zip(*ledgers, strict=True)) if ledgers else (0, 0)
    return f"{names} ({kept:,} of {rows:,} rows)" if ledgers else names


def describe_sources(data: Any) -> dict[str, str]:
    """Return the names of the sources of a data module, with the numbers of rows that were kept.

    Args:
        data: Any data module. One without `sources` has none.
    """
    sources = getattr(data, "sources", None)
    if not isinstance(sources, Mapping):
        return {}
    ledgers: Mapping[str, Ledger] = getattr(data, "ledgers", {})
    found = {}
    for stage in STAGES:
        if stage in sources:
            names = ", ".join(shortened(part.name) for part in parts_of(sources[stage]))
            counts = [(ledger.num_kept, ledger.num_rows) for key, ledger in ledgers.items() if key.partition("/")[0] == stage]
            found[stage] = _counted(names, counts)
    return found


def sources_of_checkpoint(checkpoint: str) -> dict[str, str]:
    """Return what `describe_sources` does, from the ledger in the folder of a checkpoint's run. Empty if there is none."""
    path = Path(checkpoint).resolve().parent.parent / "ledger.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ledgers = {key: Ledger.from_dict(entry) for key, entry in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    found = {}
    for stage in STAGES:
        own = [ledger for key, ledger in ledgers.items() if key.partition("/")[0] == stage]
        if own:
            names = ", ".join(shortened(ledger.source) for ledger in own)
            found[stage] = _counted(names, [(ledger.num_kept, ledger.num_rows) for ledger in own])
    return found


def _learning_rate(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def describe_run(trainer: L.Trainer) -> dict[str, Any]:
    """Return the settings of a Trainer and its data module that matter for the result."""
    data = getattr(trainer, "datamodule", None)
    found: dict[str, Any] = {"steps": trainer.global_step, "epochs": trainer.current_epoch}
    tokens = getattr(data, "batch_tokens", None)
    name, size = ("batch size", getattr(data, "batch_size", None)) if tokens is None else ("tokens per batch", tokens)
    if isinstance(size, int):
        found[name] = size * trainer.accumulate_grad_batches * trainer.world_size
    length = getattr(data, "max_length", None)
    found |= {"max_length": length} if length is not None else {}
    if trainer.optimizers:
        optimizer = trainer.optimizers[0]
        found |= {"optimizer": type(optimizer).__name__, "learning rate": _learning_rate(optimizer.param_groups[0])}
    clip = trainer.gradient_clip_val
    found |= {"gradient_clip_val": clip} if clip is not None else {}
    seed = os.environ.get("PL_GLOBAL_SEED")
    return found | {"precision": trainer.precision} | ({"seed": seed} if seed is not None else {})


def run_of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says about its run, as in `describe_run`."""
    found = {name: checkpoint[key] for name, key in (("steps", "global_step"), ("epochs", "epoch")) if key in checkpoint}
    for state in checkpoint.get("optimizer_states") or ():
        if state.get("param_groups"):
            found["learning rate"] = _learning_rate(state["param_groups"][0])
    return found


def final_metrics(trainer: L.Trainer) -> dict[str, float]:
    """Return the last logged values of training and validation."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if getattr(value, "numel", lambda: 1)() == 1}


def metrics_of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """Return the value that the callback which saved a checkpoint monitored, if it did."""
    found = {}
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("current_score") is not None:
            found[str(state["monitor"])] = float(state["current_score"])
    return found
