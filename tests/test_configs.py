"""Every shipped configuration of a method trains, in single precision and with bf16 products, to the same loss."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_align.cli import run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BACKBONE = {
    "class_path": "lightning_align.PaLM",
    "init_args": {"num_tokens": 259, "dim": 32, "depth": 1, "heads": 2, "dim_head": 16},
}
ARITHMETIC = {"class_path": "Arithmetic", "init_args": {"num_rows": 64}}
# A configuration, those it is composed with, and the rows it cannot find by itself.
NAMES = {
    "sft/arithmetic": (["sft/arithmetic"], {"train": ARITHMETIC, "validation": ARITHMETIC}),
    "sft/arithmetic_further": (["sft/arithmetic", "sft/arithmetic_further"], {"train": ARITHMETIC, "validation": ARITHMETIC}),
    "sft/jsonl": (["sft/jsonl"], {"train": "responses.jsonl", "validation": "responses.jsonl"}),
    "dpo/arithmetic": (["dpo/arithmetic"], {"train": "pairs.jsonl", "validation": "pairs.jsonl"}),
    "dpo/jsonl": (["dpo/jsonl"], {"train": "pairs.jsonl", "validation": "pairs.jsonl"}),
}


def final_loss(name: str, precision: str) -> float:
    configs, sources = NAMES[name]
    small = {
        "model": {
            "init_args": {
                "backbone": BACKBONE,
                "lr_scheduler": {"init_args": {"total_steps": 8, "warmup_steps": 1}},
                "generation": {"max_new_tokens": 4},
            }
        },
        "data": {"init_args": {**sources, "batch_size": 8, "eval_batch_size": 8, "max_length": 64}},
        "trainer": {
            "accelerator": "cpu",
            "precision": precision,
            "max_steps": 8,
            "val_check_interval": 8,
            "log_every_n_steps": 1,
            "logger": False,
            "callbacks": [],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    Path("small.yaml").write_text(yaml.safe_dump(small))
    words = [word for config in [*configs, "small"] for word in ("--config", str(CONFIGS / f"{config}.yaml"))]
    words[-1] = "small.yaml"
    cli = run(["fit", *words])
    assert cli is not None
    # Master weights, whatever the products' precision.
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in cli.model.parameters())
    return float(cli.trainer.callback_metrics["val/loss"])


def test_every_method_configuration_is_tested() -> None:
    found = {
        f"{path.parent.name}/{path.stem}" for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("trainer", "model")
    }
    assert found - {"sft/arithmetic_test"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_products_lead_to_the_same_loss(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(16)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": f"{i}?"} for i, row in enumerate(rows)]
    for file, content in (("responses", rows), ("pairs", pairs)):
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    single, mixed = final_loss(name, "32-true"), final_loss(name, "bf16-mixed")
    assert single == pytest.approx(mixed, rel=0.02)
