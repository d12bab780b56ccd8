"""Short runs of the command line that several tests share."""

import json
from pathlib import Path

import yaml

from lightning_align.cli import AlignCLI, run

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "class_path": "lightning_align.PaLM",
    "init_args": {"num_tokens": 259, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8},
}


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(name: str, folder: Path, **changes: object) -> str:
    """A small run's configuration file."""
    module = {"sft": "SFTModule", "dpo": "DPOModule", "spin": "SPINModule"}[name]
    content: dict[str, object] = {
        "seed_everything": 3,
        "model": {"class_path": module, "init_args": {"backbone": TINY, "generation": {"max_new_tokens": 4}}},
        "data": {"class_path": module.replace("Module", "DataModule"), "init_args": {"batch_size": 4, "max_length": 32}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": name, "default_hp_metric": False},
            },
        },
    }
    content.update(changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def fit(name: str, folder: Path, rows: str, *extra: str, **changes: object) -> AlignCLI:
    data = ["--data.init_args.train", rows, "--data.init_args.validation", rows]
    cli = run(["fit", "--config", config(name, folder, **changes), *data, *extra])
    assert cli is not None
    return cli


def checkpoint(cli: AlignCLI) -> str:
    return str(next(Path(cli.trainer.log_dir or "").rglob("*.ckpt")))
