"""Every shipped configuration of a method trains, in single precision and with bf16 products, to the same loss."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_align import PaLM, SFTModule
from lightning_align.cli import run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BACKBONE = {
    "class_path": "lightning_align.PaLM",
    "init_args": {"num_tokens": 259, "dim": 32, "depth": 1, "heads": 2, "dim_head": 16},
}
RETRO = {
    "class_path": "lightning_align.RETRO",
    "init_args": {
        "decoder": BACKBONE,
        "chunk_size": 32,
        "cross_layers": [1],
        "heads": 2,
        "dim_head": 16,
        "reuse_decoder": False,  # a PaLM's attention cannot be copied
    },
}
AUGMENTS = [{"model": BACKBONE, "connections": [[1, 1]]}]


def task(name: str) -> dict[str, Any]:
    return {"class_path": name, "init_args": {"num_rows": 64}}


def indexing(database: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"num_facts": 40, "num_held_out": 8, "num_notes": 8}
    roles = ("database", "train", "validation")
    sources = {role: {"class_path": "Facts", "init_args": {**facts, "role": role}} for role in roles}
    arguments = {"database": database, "documents": sources.pop("database"), "queries": sources}
    return {"class_path": "RetrievalIndexing", "init_args": {**arguments, "encoder": "bm25", "chunk_size": 32, "k": 2}}


def rows(train: Any, **model: Any) -> dict[str, Any]:
    return {
        "model": {"backbone": BACKBONE, **model},
        "data": {"tokenizer": "bytes", "train": train, "validation": train, "eval_batch_size": 8, "max_length": 64},
    }


def facts(database: str) -> dict[str, Any]:
    model = {"backbone": RETRO, "num_neighbors": 1}
    data = {
        "tokenizer": "bytes",
        "database": database,
        "num_neighbors": 1,
        "eval_num_neighbors": 1,
        "num_chunks": 2,
        "eval_batch_size": 4,
    }
    return {"model": model, "data": data, "trainer": {"callbacks": [indexing(database)]}}


COMPOSED = {"anchor": BACKBONE, "augments": AUGMENTS}
COMPOSITION = {"backbone": {"class_path": "CALM", "init_args": COMPOSED}, "init_from": None}
LOOP = {
    "max_epochs": -1,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "callbacks": [{"class_path": "SelfPlayGeneration", "init_args": {"iterations": 1, "epochs": 4}}],
}
# Files of a configuration, and what makes it small: the last one's folder and name are those of the test.
NAMES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sft/arithmetic": (["sft/arithmetic"], rows(task("Arithmetic"))),
    "sft/arithmetic_further": (["sft/arithmetic", "sft/arithmetic_further"], rows(task("Arithmetic"))),
    "sft/jsonl": (["sft/jsonl"], rows("responses.jsonl")),
    "sft/huggingface": (["sft/huggingface"], rows("responses.jsonl")),  # with a PaLM here; as it is, in test_export
    "dpo/huggingface": (["dpo/huggingface"], rows("pairs.jsonl")),
    "spin/huggingface": (["spin/huggingface"], rows("responses.jsonl") | {"trainer": LOOP}),
    "calm/huggingface": (["calm/huggingface"], rows("responses.jsonl") | {"model": COMPOSED}),
    "retro/huggingface": (["retro/huggingface"], facts("huggingface")),
    "sft/markov": (["sft/markov"], rows(task("MarkovChain"))),
    "dpo/arithmetic": (["dpo/arithmetic"], rows("pairs.jsonl")),
    "dpo/jsonl": (["dpo/jsonl"], rows("pairs.jsonl")),
    "spin/arithmetic": (["spin/arithmetic"], rows("responses.jsonl") | {"trainer": LOOP}),
    "spin/markov": (["spin/markov"], rows(task("MarkovChain")) | {"trainer": LOOP}),
    "spin/jsonl": (["spin/jsonl"], rows("responses.jsonl") | {"trainer": LOOP}),
    "spin/per_step": (["spin/per_step"], rows("responses.jsonl") | {"trainer": {**LOOP, "accumulate_grad_batches": 1}}),
    "calm/dpo": (["calm/dpo"], rows("pairs.jsonl") | {"model": COMPOSITION}),
    "calm/spin": (["calm/spin"], rows("responses.jsonl") | {"model": COMPOSITION, "trainer": LOOP}),
    "calm/key_value_anchor": (["calm/key_value_anchor"], rows(task("KeyValue"))),
    "calm/key_value_augment": (["calm/key_value_augment"], rows(task("KeyValue"))),
    "calm/key_value": (["calm/key_value"], rows(task("KeyValue")) | {"model": COMPOSED}),
    "retro/facts": (["retro/facts"], facts("facts")),
    "retro/stdlib": (["retro/stdlib"], facts("stdlib")),
    "retro/folder": (["retro/stdlib", "retro/folder"], facts("folder")),
}
ELSEWHERE = {"sft/arithmetic_test"}
"""Laid over sft/arithmetic to test, not to train."""
ABLATIONS = [path.stem for path in sorted((CONFIGS / "calm" / "ablation").glob("*.yaml"))]


def final_loss(name: str, precision: str) -> float:
    configs, small = NAMES[name]
    model = {"lr_scheduler": {"init_args": {"total_steps": 8, "warmup_steps": 1}}, "generation": {"max_new_tokens": 4}}
    trainer = {
        "accelerator": "cpu",
        "precision": precision,
        "max_steps": 8,
        "val_check_interval": 8,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "logger": False,
        "callbacks": [],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if "spin" in name:  # whose learning rate follows the iterations
        model.pop("lr_scheduler")
    content = {
        "model": {"init_args": model | small["model"]},
        "data": {"init_args": {"batch_size": 8, **small["data"]}},
        "trainer": trainer | small.get("trainer", {}),
    }
    Path("small.yaml").write_text(yaml.safe_dump(content))
    words = [word for config in configs for word in ("--config", str(CONFIGS / f"{config}.yaml"))]
    cli = run(["fit", *words, "--config", "small.yaml"])
    assert cli is not None
    assert cli.trainer.global_step == 8
    # Master weights, whatever the products' precision.
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in cli.model.parameters())
    return float(cli.trainer.callback_metrics["val/bits_per_byte" if name.startswith("retro") else "val/loss"])


def test_every_method_configuration_is_tested() -> None:
    found = {
        f"{path.parent.name}/{path.stem}" for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("trainer", "model")
    }
    assert found - ELSEWHERE == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_products_lead_to_the_same_loss(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    answers = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(16)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": f"{i}?"} for i, row in enumerate(answers)]
    for file, content in (("responses", answers), ("pairs", pairs)):
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "texts").mkdir()  # of retro/folder: looked at as the command line is read
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text("a text")
    single, mixed = final_loss(name, "32-true"), final_loss(name, "bf16-mixed")
    assert single == pytest.approx(mixed, rel=0.02)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_train_from_the_two_checkpoints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    for model in ("calm_anchor", "calm_augment"):
        trainer = L.Trainer(accelerator="cpu", max_steps=0, logger=False, num_sanity_val_steps=0)
        backbone = PaLM(num_tokens=259, dim=16, depth=4, heads=2, dim_head=8)
        trainer.fit(SFTModule(backbone), DataLoader([0]), DataLoader([0]))  # of which nothing is read
        trainer.save_checkpoint(f"runs/{model}/last.ckpt")
    data = {"train": task("KeyValue"), "validation": task("KeyValue"), "batch_size": 8}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run_it = {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1, "callbacks": [], **off}
    Path("small.yaml").write_text(yaml.safe_dump({"data": {"init_args": data}, "trainer": run_it}))
    files = (CONFIGS / "calm/key_value.yaml", CONFIGS / f"calm/ablation/{name}.yaml", "small.yaml")
    cli = run(["fit", *(word for file in files for word in ("--config", str(file)))])
    assert cli is not None
    assert cli.trainer.global_step == 2
    assert bool(cli.trainer.callback_metrics["val/loss"].isfinite())
