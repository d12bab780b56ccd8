"""A short version of the demo: two numbers in place of three, a fraction of the steps, everything else the same.

How many problems so short a training solves depends on when it leaves its plateau, and that on how a processor rounds. So what
is asked of it is what every training of its kind learns: the form of an answer, and to tell the pairs that it trains on apart.
The gains of the full demo are in the README.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SFT_STEPS, STEPS = 300, 100


def shorter(node: Any, steps: int) -> Any:
    """A configuration with smaller problems and fewer steps."""
    if isinstance(node, list):
        return [shorter(item, steps) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: shorter(value, steps) for key, value in node.items()}
    if node.get("class_path") == "Arithmetic":
        arguments = node["init_args"]
        node["init_args"] = arguments | {"num_operands": 2, "num_rows": min(arguments["num_rows"], 3000)}
    if "num_samples" in node:
        node["num_samples"] = 6  # of a policy that seldom solves a problem there would be too few pairs
    if node.get("class_path") == "WarmupDecay":
        node["init_args"]["total_steps"] = steps
    if "max_steps" in node:
        node |= {"max_steps": steps, "val_check_interval": steps}
    if "num_problems" in node:
        node["num_problems"] = min(node["num_problems"], 500)
    if "every_n_train_steps" in node:
        node["every_n_train_steps"] = steps
    return node


def own_cores() -> None:
    """Give the demo, which takes as many threads as it has cores, no more of them than this test has threads."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % len(cores)
        os.sched_setaffinity(0, (cores[first:] + cores[:first])[: int(os.environ["OMP_NUM_THREADS"])])


@pytest.mark.timeout(2400)
def test_the_demo_fine_tunes_samples_judges_aligns_and_compares(tmp_path: Path) -> None:
    for name, steps in (
        ("sft/arithmetic", SFT_STEPS),
        ("sft/arithmetic_further", STEPS),
        ("sft/arithmetic_test", STEPS),
        ("dpo/arithmetic", STEPS),
    ):
        content = shorter(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()), steps)
        if name == "dpo/arithmetic":
            content["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 2e-3
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    command = [sys.executable, str(ROOT / "examples" / "arithmetic_demo.py"), "--configs", str(tmp_path / "configs")]
    command += ["--folder", str(tmp_path / "demo")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, preexec_fn=own_cores
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    solved = {
        row: json.loads((tmp_path / f"demo/seed_0/test_{row}.json").read_text())["test/solved"]
        for row in ("sft", "further", "winners", "dpo")
    }
    for title in ("SFT on the sloppy", "further SFT steps", "on correct answers", "+ DPO", "tensorboard --logdir"):
        assert title in result.stdout
    assert f"{100 * solved['dpo']:5.1f}" in result.stdout
    # The worst is that of three instruction sets, each with one thread and with two, and of four seeds.
    tuned, aligned = (json.loads((tmp_path / f"demo/seed_0/fit_{step}.json").read_text()) for step in ("sft", "dpo"))
    assert tuned["val/loss"] < math.log(259) / 3, tuned  # 1.85, from 5.6; the worst is 1.14
    assert aligned["train/rewards/margins"] > 0.05, aligned  # from 0; the worst is 0.125
    assert aligned["train/rewards/accuracies"] > 0.6, aligned  # the worst is 0.81, of 32 pairs
