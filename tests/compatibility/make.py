"""Makes the artifacts that later releases must open: `python tests/compatibility/make.py`.

Run it once for each release, on one CPU core, and commit what it writes: the folder `tests/compatibility/<version>`. What
stands there is never made again, so that it stays what that release wrote. Only the command line and documented names are used.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import lightning_align  # noqa: E402
from lightning_align.cli import run  # noqa: E402
from lightning_align.models.formats import read_model  # noqa: E402
from tests.compatibility.kept import FURTHER, MODULES, STEPS, TOKENS, losses, numbers  # noqa: E402

SIZES = {"num_tokens": 259, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "ff_mult": 2, "variant": "paper"}
BYTES = {"batch_size": 4, "max_length": 24, "cache_dir": "cache"}
DOCUMENTS = {
    "documents/a.txt": "the quick brown fox jumps over the lazy dog",
    "documents/b.txt": "the quick brown cat sleeps under the warm sun all day long",
    "documents/c.txt": "a lazy dog and a quick brown fox meet at noon, and then they part",
    "held_out/v.txt": "the quick brown dog jumps at noon over a warm cat",
}


def one(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_align.{class_path}", "init_args": init_args}


def config(name: str, model: dict[str, Any], data: dict[str, Any], *callbacks: dict[str, Any], **trainer: Any) -> None:
    """Write the configuration of a run; classes are named by the modules that they stood in."""
    torch_classes = {
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": name}},
        "checkpoints": {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"every_n_train_steps": 1, "save_top_k": 0, "save_last": True},
        },
    }
    model["init_args"] |= {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "betas": [0.9, 0.98]}},
        "lr_scheduler": one("schedules.WarmupDecay", total_steps=12, warmup_steps=2, decay="linear", final=0.1),
    }
    content = {
        "seed_everything": 3,
        "model": model,
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS[name],
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": torch_classes["logger"],
            "callbacks": [*callbacks, torch_classes["checkpoints"]],
            **trainer,
        },
    }
    Path("configs").mkdir(exist_ok=True)
    Path(f"configs/{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def write_inputs() -> None:
    """Rows, documents and configurations."""
    rows = [{"prompt": f"{i}{'+' * (i % 3)}1=", "response": str(i + 1) * (1 + i % 3)} for i in range(12)]
    pairs = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}" * (1 + i % 2), "rejected": f"{i + 3}!"} for i in range(12)]
    for path, content in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in content))
    for path, text in DOCUMENTS.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    decoder = one("models.palm.PaLM", **SIZES)
    base, short = "checkpoints/sft.ckpt", {"max_new_tokens": 4, "temperature": 0.0}
    pair_data = one("dpo.datamodule.DPODataModule", train="pairs.jsonl", validation="pairs.jsonl", **BYTES)
    config(
        "sft",
        one("sft.module.SFTModule", backbone=decoder, generation=short),
        one("sft.datamodule.SFTDataModule", train="rows.jsonl", validation="rows.jsonl", **BYTES),
        one("callbacks.SampleLogger", num_samples=2, max_new_tokens=4),
        one(
            "callbacks.SolveRate",
            problems=one("data.tasks.arithmetic.Arithmetic", num_rows=4, split="validation"),
            max_new_tokens=4,
        ),
        one("export.ExportModel"),
    )
    config(
        "sft_lora",
        one("sft.module.SFTModule", init_from=base, lora={"rank": 2, "alpha": 4.0, "targets": ["in_proj", "attn_out"]}),
        one("sft.datamodule.SFTDataModule", train="rows.jsonl", **BYTES),
        one("export.ExportModel", adapter_only=True),
    )
    config(
        "dpo_frozen",
        one("dpo.module.DPOModule", init_from=base, beta=0.3, loss={"sigmoid": 0.8, "ipo": 0.2}, ld_alpha=0.5),
        pair_data,
        one("dpo.monitor.PreferenceMonitor", num_prompts=2, max_new_tokens=4),
    )
    config("dpo_stored", one("dpo.module.DPOModule", init_from=base, reference="stored", reference_cache="cache"), pair_data)
    config(
        "dpo_moving",
        one("dpo.module.DPOModule", init_from=base, reference="moving"),
        pair_data,
        one("reference.ReferenceUpdate", alpha=0.5, every=2),
    )
    config(
        "spin",
        one("spin.module.SPINModule", init_from=base, generation={"max_new_tokens": 4, "seed": 3}, monitor_kl=True),
        one("spin.datamodule.SPINDataModule", train="rows.jsonl", validation="rows.jsonl", **BYTES),
        one("spin.callbacks.SelfPlayGeneration", iterations=2, folder="sets"),
        max_epochs=-1,
    )
    config(
        "calm",
        one(
            "calm.module.CALMModule",
            anchor=base,
            augments=[{"model": "checkpoints/dpo_frozen.ckpt", "num_connections": 1}],
            connection={"heads": 2, "dim_head": 8},
            store_states="cache/states",
        ),
        one("calm.datamodule.CALMDataModule", train="rows.jsonl", validation="rows.jsonl", **BYTES),
    )
    retro = {"chunk_size": 8, "cross_layers": [2], "encoder_dim": 12, "encoder_depth": 1, "heads": 2, "dim_head": 6}
    config(
        "retro",
        one("retro.module.RETROModule", backbone=one("retro.model.RETRO", decoder=decoder, ff_mult=2, **retro)),
        one("retro.datamodule.RETRODataModule", database="database", num_chunks=2, batch_size=4),
        one(
            "retro.callbacks.RetrievalIndexing",
            database="database",
            documents=one("data.documents.FolderDocuments", folder="documents"),
            queries={"validation": one("data.documents.FolderDocuments", folder="held_out")},
            encoder=base,
            rerank=True,
            chunk_size=8,
            k=2,
        ),
        one("retro.panel.NeighborPanel"),
        max_epochs=-1,
    )


def make() -> dict[str, Any]:
    """Run everything in the current folder; returns the numbers that are to be found again."""
    write_inputs()
    Path("checkpoints").mkdir()
    expected: dict[str, Any] = {"logits": {}, "losses": {}}
    tokens = torch.tensor([TOKENS])
    for name, class_name in MODULES.items():
        checkpoint = f"checkpoints/{name}.ckpt"
        run(["fit", "--config", f"configs/{name}.yaml"])
        shutil.copy(f"runs/{name}/version_0/checkpoints/last.ckpt", checkpoint)
        module = getattr(lightning_align, class_name).load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
        with torch.no_grad():
            expected["logits"][name] = numbers(module.eval()(tokens))
    run(["export", "checkpoints/dpo_frozen.ckpt", "--output", "export", "--tokenizer", "bytes"])
    run(["export", "checkpoints/sft_lora.ckpt", "--output", "adapter", "--adapter_only", "true"])
    with torch.no_grad():
        expected["logits"]["export"] = numbers(read_model("export")(tokens))
    for name in MODULES:
        steps = ["--trainer.max_steps", str(STEPS[name] + FURTHER)]
        run(["fit", "--config", f"configs/{name}.yaml", "--ckpt_path", f"checkpoints/{name}.ckpt", *steps])
        expected["losses"][name] = losses(Path(f"runs/{name}/version_1"))
    return expected


def main() -> None:
    target = HERE / lightning_align.__version__
    if target.exists():
        sys.exit(f"{target} is there: what a release wrote is not made again")
    torch.set_num_threads(1)
    sys.argv = ["lightning-align"]  # the command line's own arguments are not this script's
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        expected = make()
        Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        shutil.rmtree("runs")
        os.chdir(HERE)
        shutil.copytree(folder, target)


if __name__ == "__main__":
    main()
