"""Tests of compositions on the command line: trained, exported, and served from their folder by another process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_align import PaLM, load_composition
from lightning_align.calm.model import CALM
from lightning_align.cli import run
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.data.tokenizer.record import vocabulary_fingerprint
from lightning_align.export.tokenizer import part_tokenizers
from lightning_align.models.formats import whole_weights, write_model
from tests.toys import gap

ROWS = [{"prompt": f"What comes after {i}?", "response": f" {i + 1}"} for i in range(8)]
OFF = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows and two models that read bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": " no"} for row in ROWS]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    torch.manual_seed(0)
    for name, dim in (("anchor", 16), ("augment", 8)):
        model = PaLM(num_tokens=259, dim=dim, depth=2, heads=2, dim_head=4)
        write_model(model, whole_weights(model), name)
    return tmp_path


def config(name: str, method: str, rows: str, model: dict[str, Any], data: dict[str, Any] | None = None) -> list[str]:
    """Write a configuration of two steps that exports to the folder `name`, and return its arguments."""
    keep = {"dirpath": name + "_checkpoints", "save_last": True}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep},
        {"class_path": "ExportModel", "init_args": {"folder": name}},
    ]
    content = {
        "model": {"class_path": f"{method}Module", "init_args": {"generation": {"max_new_tokens": 4}, **model}},
        "data": {
            "class_path": f"{method}DataModule",
            "init_args": {"train": rows, "predict": "rows.jsonl", "batch_size": 4, "tokenizer": "bytes", **(data or {})},
        },
        "trainer": {"accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1, "callbacks": callbacks, **OFF},
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ["--config", f"{name}.yaml"]


COMPOSED = {"anchor": "anchor", "augments": [{"model": "augment", "num_connections": 1}], "connection": {"heads": 2}}
TOKENS = torch.arange(3, 23).view(2, 10)


def test_a_composition_is_exported_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run(["fit", *config("calm", "CALM", "rows.jsonl", COMPOSED)])
    assert fitted is not None
    policy = fitted.model.policy
    checkpoint = "calm_checkpoints/last.ckpt"
    assert Path(checkpoint).stat().st_size < 10 * sum(p.numel() * 4 for p in policy.connections.parameters())
    run(["export", checkpoint, "--output", "whole"])
    run(["export", checkpoint, "--output", "references", "--frozen", "references"])
    run(["export", "references", "--output", "again"])
    for name in ("calm", "whole", "references", "again"):
        assert gap(load_composition(name)(TOKENS), policy(TOKENS)) == 0
        assert Path(name, "anchor").is_dir() == (name != "references")
        assert Path(name, "tokenizer.json").is_file()
    run(["predict", "--config", "calm.yaml", "--ckpt_path", checkpoint, "--output", "1.jsonl"])
    run(["predict", "--config", "calm.yaml", "--ckpt_path", "whole", "--output", "2.jsonl"])
    assert Path("1.jsonl").read_text() == Path("2.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"is an exported model.*--model.init_from"):
        run(["fit", "--config", "calm.yaml", "--ckpt_path", "whole"])

    aligned = run(["fit", *config("dpo", "DPO", "pairs.jsonl", {"init_from": "calm"})])
    assert aligned is not None
    run(["export", "dpo_checkpoints/last.ckpt", "--output", "dpo_again"])
    for name in ("dpo", "dpo_again"):
        assert gap(load_composition(name)(TOKENS), aligned.model.policy(TOKENS)) == 0
    shutil.rmtree("calm")
    with pytest.raises(SystemExit, match="calm/anchor"):
        run(["export", "dpo_checkpoints/last.ckpt", "--output", "lost"])
    assert not Path("lost").exists()


def test_any_exported_folder_can_be_predicted_from() -> None:
    words = ["predict", *config("sft", "SFT", "rows.jsonl", {"init_from": "anchor"})]
    run([*words, "--output", "1.jsonl"])
    other = {"backbone": {"class_path": "lightning_align.PaLM", "init_args": {"num_tokens": 259, "dim": 8, "depth": 1}}}
    words = ["predict", *config("sft", "SFT", "rows.jsonl", other)]
    run([*words, "--ckpt_path", "anchor", "--output", "2.jsonl"])
    assert Path("1.jsonl").read_text() == Path("2.jsonl").read_text()


def test_a_composition_is_a_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = {"class_path": "CALM", "init_args": COMPOSED}
    fitted = run(["fit", *config("dpo", "DPO", "pairs.jsonl", {"backbone": backbone})])
    assert fitted is not None
    assert isinstance(fitted.model.policy, CALM)
    path = "dpo_checkpoints/last.ckpt"
    assert all("connections" in name for name in torch.load(path, weights_only=True)["state_dict"])
    run(["fit", "--config", "dpo.yaml", "--ckpt_path", path, "--trainer.max_steps", "3"])
    run(["predict", "--config", "dpo.yaml", "--ckpt_path", path, "--output", "1.jsonl"])
    assert len(Path("1.jsonl").read_text().splitlines()) == len(ROWS)


def test_two_families_with_their_own_tokenizers_are_served_by_another_process(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {
        "llama": (LlamaForCausalLM, LlamaConfig(vocab_size=290, **small)),
        "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=275, n_embd=8, n_layer=2, n_head=2, n_positions=64)),
    }
    for name, (kind, settings) in models.items():
        kind(settings).save_pretrained(name)
        run(["tokenizer", "rows.jsonl", "--output", f"{name}.json", "--vocab_size", str(settings.vocab_size)])
        PreTrainedTokenizerFast(tokenizer_file=f"{name}.json", **specials).save_pretrained(name)
    llama, gpt2 = ({"class_path": "PretrainedLM", "init_args": {"name": name}} for name in models)
    augments = [{"model": gpt2, "tokens": "own", "num_connections": 2}]
    data = {"tokenizer": "llama", "augment_tokenizers": ["gpt2"]}
    composed = {"anchor": llama, "augments": augments, "connection": {"heads": 2}}
    fitted = run(["fit", *config("calm", "CALM", "rows.jsonl", composed, data)])
    assert fitted is not None
    expected = [row for part in fitted.trainer.predict(fitted.model, fitted.datamodule) or [] for row in part]
    path = "calm_checkpoints/last.ckpt"
    (own,) = part_tokenizers(path, torch.load(path, weights_only=True))  # as `lightning-align export` finds it
    assert own is not None
    assert own.fingerprint == load_tokenizer("gpt2").fingerprint
    # An export adds the chat template.
    assert vocabulary_fingerprint(load_tokenizer("calm/augment_0")) == vocabulary_fingerprint(own)
    for name in (*models, "calm_checkpoints"):
        shutil.rmtree(name)  # the folder is all that is left

    serving = {"init_from": "calm", "generation": {"max_new_tokens": 4}}
    arguments = {
        "predict": "rows.jsonl",
        "batch_size": 4,
        "tokenizer": "calm",
        "augment_tokenizers": ["calm/augment_0"],
    }
    content = {
        "model": {"class_path": "CALMModule", "init_args": serving},
        "data": {"class_path": "CALMDataModule", "init_args": arguments},
        "trainer": {"accelerator": "cpu", **OFF},
    }
    Path("serve.yaml").write_text(yaml.safe_dump(content))
    words = [sys.executable, "-m", "lightning_align", "predict", "--config", "serve.yaml", "--output", "served.jsonl"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    served = [json.loads(line) for line in Path("served.jsonl").read_text().splitlines()]
    assert [row["responses"] for row in served] == [row["responses"] for row in expected]
    assert len(served) == len(ROWS)
