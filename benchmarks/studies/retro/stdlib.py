"""RETRO on the standard library of Python (configs/retro/stdlib.yaml), for several seeds, with controls.

Each seed is trained by `fit` and measured by `validate`. Then the last model is measured with a database that contains the
held-out files themselves. This planted leak must be flagged; the table shows the false gain that it causes.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import common
from lightning_align.cli import run
from lightning_align.data.documents import StandardLibrary
from lightning_align.retro.datamodule import RETRODataModule
from lightning_align.retro.indexing import build_database
from lightning_align.retro.panel import NeighborPanel

ARMS = ("on", "off", "random", "shuffled", "k_1", "k_4", "k_8")
Metrics = dict[str, float]


def load(folder: Path, steps: int | None) -> dict[str, Any]:
    """The configuration, with database and runs in the given folder."""
    config: dict[str, Any] = yaml.safe_load((common.CONFIGS / "retro" / "stdlib.yaml").read_text())
    data, trainer = config["data"]["init_args"], config["trainer"]
    data["database"] = trainer["callbacks"][0]["init_args"]["database"] = str(folder / "database")
    data["tokenizer"] = str(common.CONFIGS.parent / data["tokenizer"])
    trainer["logger"]["init_args"]["save_dir"] = str(folder / "runs")
    trainer.update(enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
    if steps is not None:
        trainer["max_steps"] = config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] = steps
    return config


def command(name: str, config: dict[str, Any], folder: Path, *options: str) -> Metrics:
    """Run a command with a configuration and return its metrics."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    cli = run([name, "--config", str(folder / "config.yaml"), *options])
    assert cli is not None
    if name == "fit":
        cli.trainer.save_checkpoint(folder / "model.ckpt", weights_only=True)
    return {key.removeprefix("meta/").removeprefix("val/"): float(value) for key, value in cli.trainer.callback_metrics.items()}


def one_seed(seed: int, folder: Path, steps: int | None) -> dict[str, Any]:
    """Train and measure."""
    config = load(folder, steps)
    config["seed_everything"] = seed
    start = time.perf_counter()
    command("fit", config, folder)
    trained = time.perf_counter() - start
    config["trainer"]["limit_val_batches"] = 1.0
    start = time.perf_counter()
    clean = command("validate", config, folder, "--ckpt_path", str(folder / "model.ckpt"))
    return {"seed": seed, "fit seconds": trained, "validate seconds": time.perf_counter() - start, **clean}


def leak(folder: Path, steps: int | None) -> dict[str, Any]:
    """Measure the model of the last seed with a database that contains the held-out files."""
    config = load(folder, steps)
    indexing, data = config["trainer"]["callbacks"][0]["init_args"], config["data"]["init_args"]
    held_out = StandardLibrary(**indexing["queries"]["validation"]["init_args"])
    leaky = build_database(
        folder / "leaky",
        held_out,
        encoder="bm25",
        queries={"validation": held_out},
        tokenizer=data["tokenizer"],
        chunk_size=config["model"]["init_args"]["backbone"]["init_args"]["chunk_size"],
        k=indexing["k"],
        hide_copies=False,
    )
    data["database"] = str(leaky.folder)
    del config["trainer"]["callbacks"][0]
    config["trainer"]["limit_val_batches"] = 1.0
    config["model"]["init_args"]["by_k"] = []
    checkpoint = ("--ckpt_path", str(folder / "model.ckpt"))
    data["on_leak"] = "fail"
    try:
        command("validate", config, folder, *checkpoint)
    except (SystemExit, ValueError) as error:
        flagged = str(error)
    else:
        flagged = ""
    data["on_leak"] = "warn"
    return {"flagged": flagged.splitlines()[0] if flagged else "", **command("validate", config, folder, *checkpoint)}


def examples(folder: Path, steps: int | None) -> str:
    """The neighbors of some held-out chunks."""
    data = RETRODataModule(**load(folder, steps)["data"]["init_args"])
    return NeighborPanel(num_chunks=6).table(data, data.database)


def arms_table(results: list[dict[str, Any]]) -> str:
    """Bits per byte by arm, one row per seed."""
    return common.table(
        [{"seed": str(r["seed"]), **{arm: f"{r[f'{arm}/bits_per_byte']:.4f}" for arm in ARMS}} for r in results]
    )


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps; default: those of the configuration")
    parser.add_argument("--folder", type=Path, help="folder for database and runs; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="JSON file for all metrics")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    results = []
    for seed in arguments.seeds:
        results.append(one_seed(seed, folder, arguments.steps))
        common.save(arguments.output, {"seeds": results})
    planted = {"seed": arguments.seeds[-1], **leak(folder, arguments.steps)}
    content = {"seeds": results, "leak": planted, "examples": examples(folder, arguments.steps)}
    common.save(arguments.output, content)
    report(results, planted)


def report(results: list[dict[str, Any]], planted: dict[str, Any]) -> None:
    """Print the section."""
    first = results[0]
    minutes = ", ".join(f"{(r['fit seconds'] + r['validate seconds']) / 60:.0f}" for r in results)
    common.heading(
        "RETRO on the standard library of Python",
        f"configs/retro/stdlib.yaml on {torch.get_num_threads()} threads, {minutes} minutes per seed; bits per byte of "
        f"{first['documents']:.0f} held-out files, {first['bytes_alpha_1.0'] / 1e6:.2f} MB.",
    )
    print(arms_table(results))
    rows = []
    for r in results:
        gains = {
            arm: f"{r[f'{arm}/gain']:.4f} ({r[f'{arm}/gain_low']:.4f} to {r[f'{arm}/gain_high']:.4f})"
            for arm in ("off", "random", "shuffled")
        }
        low = {arm: r[f"{arm}/bits_per_byte_alpha_0.125"] for arm in ("on", "off", "random")}
        rows.append(
            {
                "seed": str(r["seed"]),
                **{f"gain of ON over {arm.upper()} (95 % interval over files)": text for arm, text in gains.items()},
                "overlap ≤ 1/8: share of bytes": f"{r['bytes_alpha_0.125'] / r['bytes_alpha_1.0']:.0%}",
                **{f"{arm.upper()}, overlap ≤ 1/8": f"{value:.4f}" for arm, value in low.items()},
            }
        )
    print(common.table(rows))
    claims = [
        common.claim(
            f"seed {r['seed']}: lower end of the gain of ON over OFF and RANDOM",
            "> 0",
            f"{r['off/gain_low']:.4f}, {r['random/gain_low']:.4f}",
            min(r["off/gain_low"], r["random/gain_low"]) > 0,
        )
        for r in results
    ]
    clean = next(r for r in results if r["seed"] == planted["seed"])
    claims += [
        common.claim("the held-out files in the database", "flagged", planted["flagged"][:60] + "…", bool(planted["flagged"])),
        common.claim(
            "apparent gain of ON over OFF with the leak",
            f"> {clean['off/gain']:.3f}, the gain without it (seed {clean['seed']})",
            f"{planted['off/gain']:.3f}",
            planted["off/gain"] > clean["off/gain"],
        ),
    ]
    print(common.table(claims))


if __name__ == "__main__":
    main()
