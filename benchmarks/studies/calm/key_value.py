"""Table 1 of the CALM paper and its ablations, on key-value arithmetic at a small scale.

    python benchmarks/run.py studies/calm/key_value.py --seeds 0 1 2    # runs the missing steps
    python benchmarks/run.py studies/calm/key_value.py --table          # runs nothing, prints the table

All steps run through the entry point of the command line. Each seed has its own folder, ``runs/calm_table/seed_<n>``. The
results of each step go to ``key_value.json`` beside this file. The seed chooses weights and rows; the table of keys and values
is the same for all seeds. Settings were chosen on the validation keys of seed 0. The reported columns use other keys.
"""

import argparse
import json
import os
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import common

CONFIGS = common.CONFIGS / "calm"
RESULTS = Path(__file__).resolve().with_suffix(".json")
CHECKPOINT = "runs/{}/version_0/checkpoints/last.ckpt"
# Step: title in the table, command, configurations, name of the run.
STEPS = {
    "augment": ("", "fit", ["key_value_augment"], "calm_augment"),
    "anchor": ("", "fit", ["key_value_anchor"], "calm_anchor"),
    "calm": ("CALM", "fit", ["key_value"], "calm_key_value"),
    "validate": ("", "validate", ["key_value"], "calm_key_value"),
    "augment_alone": ("augment alone", "validate", ["key_value", "ablation/finetuned"], "calm_augment"),
    "anchor_alone": ("anchor alone", "validate", ["key_value", "ablation/finetuned"], "calm_anchor"),
    "random": ("random augment", "fit", ["key_value", "ablation/random"], "calm_random"),
    "vanilla": ("vanilla augment", "fit", ["key_value", "ablation/vanilla"], "calm_vanilla"),
    "encoder": ("augment as encoder", "fit", ["key_value", "ablation/encoder"], "calm_encoder"),
    "lora": ("LoRA on the anchor", "fit", ["key_value", "ablation/lora"], "calm_lora"),
    "finetuned": ("fine-tuned anchor", "fit", ["key_value", "ablation/finetuned"], "calm_finetuned"),
    "two_and_three_operands": (
        "CALM, two and three operands",
        "fit",
        ["key_value", "ablation/two_and_three_operands"],
        "calm_two_and_three_operands",
    ),
}
COLUMNS = {"kv_subs": "KV-SUBS", "num_math": "NUM-MATH", "kv_math_held_out": "KV-MATH", "kv_math_validation": "validation keys"}
ROWS = ("augment_alone", "anchor_alone", "calm", "random", "vanilla", "encoder", "lora", "finetuned", "two_and_three_operands")


def words(step: str, seed: int) -> list[str]:
    """The command of a step. It runs in the folder of the seed."""
    _, command, configs, run = STEPS[step]
    checkpoint = CHECKPOINT.format(run)
    found = [command, *(word for name in configs for word in ("--config", str(CONFIGS / f"{name}.yaml")))]
    found += ["--seed_everything", str(seed), "--trainer.enable_progress_bar", "false"]
    if command == "fit":
        found += ["--data.init_args.train.init_args.seed", str(seed), "--trainer.logger.init_args.version", "version_0"]
        found += ["--ckpt_path", checkpoint] if Path(checkpoint).exists() else []
    else:
        found += ["--trainer.logger", "false"]
        found += ["--ckpt_path", checkpoint] if step == "validate" else ["--model.init_args.init_from", checkpoint]
    return found


def needs(step: str) -> tuple[str, ...]:
    """Steps whose checkpoints a step needs. They run again if the checkpoints are gone."""
    both = ("augment", "anchor")
    return () if step in both else (*both, "calm") if step == "validate" else both


def measure(step: str, seed: int, folder: Path) -> dict[str, float]:
    """Run a step, and return its metrics and its time."""
    from lightning_align.cli import run

    (folder / f"seed_{seed}").mkdir(parents=True, exist_ok=True)
    os.chdir(folder / f"seed_{seed}")
    arguments = words(step, seed)
    print(f"\n$ lightning-align {shlex.join(arguments)}", flush=True)
    start, cpu = time.perf_counter(), time.process_time()
    cli = run(arguments)
    assert cli is not None
    logged = {name.removeprefix("val/"): float(value) for name, value in cli.trainer.callback_metrics.items()}
    kept = {name: value for name, value in logged.items() if name in COLUMNS or name == "loss"}
    trained = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    return {
        **{name: round(value, 4) for name, value in kept.items()},
        "steps": cli.trainer.global_step,
        "trained": trained,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def show(results: dict[str, dict[str, Any]]) -> str:
    """The table of the stored results: means over seeds, then the value of each seed."""
    rows = []
    for step in ROWS:
        runs = [result[step] for result in results.values() if step in result]
        if not runs:
            continue
        cells = {"": STEPS[step][0], "seeds": str(len(runs))}
        fitted = STEPS[step][1] == "fit"
        cells["steps"] = f"{runs[0]['steps']:,}" if fitted else ""
        cells["trained parameters"] = f"{runs[0]['trained']:,}" if fitted else ""
        for name, column in COLUMNS.items():
            values = [100 * run[name] for run in runs]
            each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
            cells[column] = f"{statistics.mean(values):.1f}{each}"
        rows.append(cells)
    return common.table(rows) if rows else "no results yet"


def main() -> None:
    """Parse the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS), help="steps to run, in this order")
    parser.add_argument("--folder", type=Path, default=Path("runs/calm_table"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    folder, output = options.folder.resolve(), options.output.resolve()
    results: dict[str, dict[str, Any]] = json.loads(output.read_text()) if output.exists() else {}
    for seed in () if options.table else options.seeds:
        for step in options.steps:
            if step not in results.get(str(seed), {}):
                for needed in needs(step):
                    if not (folder / f"seed_{seed}" / CHECKPOINT.format(STEPS[needed][3])).exists():
                        measure(needed, seed, folder)
                found = measure(step, seed, folder)
                results = json.loads(output.read_text()) if output.exists() else {}  # another process may have written
                results.setdefault(str(seed), {})[step] = found
                common.save(output, results)
    common.heading(
        "CALM: key-value arithmetic",
        "Percent correct with greedy decoding, on keys that were neither composed in training nor used to choose settings: "
        "1,000 questions of KV-MATH, 500 of the others. Two operands unless stated; 1,000 keys, half of them composed in "
        "training.",
    )
    print(show(results))


if __name__ == "__main__":
    main()
