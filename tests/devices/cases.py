"""Small runs of every method and option, for the pretended GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

import lightning_align as la
from tests.devices.pretended import pretended_trainer

Case = tuple[L.LightningModule, L.LightningDataModule, list[Callback]]
GENERATION = la.GenerationConfig(max_new_tokens=9, batch_size=4)
STEPS = 3


def palm(**more: Any) -> la.PaLM:
    return la.PaLM(**{"num_tokens": 259, "dim": 8, "depth": 2, "heads": 2, "dim_head": 4, "ff_mult": 2, **more})


def llama() -> la.PretrainedLM:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return la.PretrainedLM(config={"model_type": "llama", "vocab_size": 259, "num_key_value_heads": 1, **sizes})


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def responses(folder: Path) -> str:
    rows = [{"prompt": f"Count to {n}:", "response": " " + " ".join(map(str, range(n % 4 + 1)))} for n in range(4 * STEPS)]
    return write(folder / "responses.jsonl", rows)


def preferences(folder: Path) -> str:
    rows = [{"prompt": f"Count to {n}:", "chosen": f" {n} {n}", "rejected": " no" * (n % 3 + 1)} for n in range(4 * STEPS)]
    return write(folder / "pairs.jsonl", rows)


def base(folder: Path) -> dict[str, Any]:
    """The arguments of a policy of LoRA adapters on weights from a file."""
    torch.save(palm().state_dict(), folder / "base.pt")
    return {"backbone": palm, "init_from": str(folder / "base.pt"), "lora": la.LoRAConfig(rank=2)}


def sources(path: str, *stages: str) -> dict[str, Any]:
    return {stage: path for stage in stages} | {"batch_size": 4, "cache_dir": str(Path(path).parent / "cache")}


def sft(folder: Path, *, packing: bool = False, **more: Any) -> Case:
    packed = {"packing": True, "packed_length": 32, "max_length": 32} if packing else {}
    data = la.SFTDataModule(**sources(responses(folder), "train", "validation", "predict"), **packed)
    return la.SFTModule(**{"backbone": palm(), "generation": GENERATION, **more}), data, []


def dpo(folder: Path, *callbacks: Callback, **more: Any) -> Case:
    data = la.DPODataModule(**sources(preferences(folder), "train", "validation", "predict"))
    module = la.DPOModule(**{"backbone": palm(), "generation": GENERATION, "reference_cache": str(folder / "cache"), **more})
    return module, data, list(callbacks)


def spin(folder: Path, **more: Any) -> Case:
    data = la.SPINDataModule(**sources(responses(folder), "train", "validation", "predict"), max_length=64)
    module = la.SPINModule(**{"backbone": palm(), "generation": GENERATION, **more})
    return module, data, [la.SelfPlayGeneration(iterations=1, folder=str(folder / "generations"))]


def calm(folder: Path, *, augment: dict[str, Any] | None = None, **more: Any) -> Case:
    own = {"augment_tokenizers": ["bytes"]} if (augment or {}).get("tokens") == "own" else {}
    data = la.CALMDataModule(**sources(responses(folder), "train", "validation", "predict"), **own)
    augments = [la.Augment(palm(), num_connections=1, **(augment or {}))]
    module = la.CALMModule(palm(), augments, connection=la.ConnectionConfig(heads=2), generation=GENERATION, **more)
    return module, data, []


def retro(folder: Path, **more: Any) -> Case:
    texts = folder / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text(" ".join(f"w{(number * 7 + i) % 50}" for i in range(40)))
    settings: dict[str, Any] = {"encoder": "bm25", "queries": {"validation": str(texts)}, "chunk_size": 8, "k": 2}
    la.build_database(folder / "database", str(texts), **settings, hide_copies=False)
    prompts = write(folder / "prompts.jsonl", [{"prompt": f"w1 w2 w{n} " * 3} for n in range(4)])
    model = la.RETRO(palm(), chunk_size=8, heads=2, dim_head=4)
    module = la.RETROModule(model, num_neighbors=2, generation=GENERATION, **more)
    return module, la.RETRODataModule(str(folder / "database"), predict=prompts, num_chunks=2, batch_size=4, on_leak="warn"), []


class Waits(Callback):
    """Counts the waits of each training step after the first, of each validation batch after the first, and of prediction."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.steps: list[dict[str, int]] = []
        self.validation: list[dict[str, int]] = []
        self.prediction: dict[str, int] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert all(parameter.is_cuda for parameter in pl_module.parameters())
        self.steps.append(dict(self.device.waits))
        self.device.waits.clear()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.validation.append(dict(self.device.waits))
        self.device.waits.clear()

    def on_validation_end(self, *_: Any) -> None:
        self.device.waits.clear()

    def on_predict_start(self, *_: Any) -> None:
        self.device.waits.clear()

    def on_predict_batch_end(self, *_: Any) -> None:
        self.prediction = dict(self.device.waits)
        self.device.waits.clear()


def run(case: Callable[[Path], Case], folder: Path, device: Any, *, precision: str, epochs: int = 1) -> Waits:
    """Fit for three steps with a validation, validate, and predict."""
    module, data, callbacks = case(folder)
    waits = Waits(device)
    trainer = pretended_trainer(
        precision=precision,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        callbacks=[*callbacks, waits],
        default_root_dir=folder,
        limit_train_batches=STEPS,
        limit_val_batches=2,
        limit_predict_batches=2,  # of which the last counts
        num_sanity_val_steps=0,
        log_every_n_steps=1000,
    )
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)
    return waits
