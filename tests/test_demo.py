"""A short version of the demo: two numbers in place of three, a fifth of the steps, everything else the same.

What DPO gains in it is small: most of the model's errors are its own, and not those that a demonstration taught. The gain of
the full demo is in the README; here DPO must tell right answers from wrong ones of pairs held out, and solve more problems.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SFT_STEPS, STEPS = 400, 80


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
    if node.get("class_path") == "WarmupDecay":
        node["init_args"]["total_steps"] = steps
    if "max_steps" in node:
        node |= {"max_steps": steps, "val_check_interval": steps}
    if "num_problems" in node:
        node["num_problems"] = min(node["num_problems"], 500)
    if "every_n_train_steps" in node:
        node["every_n_train_steps"] = steps
    return node


@pytest.mark.timeout(600)
def test_the_demo_fine_tunes_samples_judges_aligns_and_compares(tmp_path: Path) -> None:
    for name, steps in (
        ("sft/arithmetic", SFT_STEPS),
        ("sft/arithmetic_further", STEPS),
        ("sft/arithmetic_test", STEPS),
        ("dpo/arithmetic", STEPS),
    ):
        content = shorter(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()), steps)
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    command = [sys.executable, str(ROOT / "examples" / "arithmetic_demo.py"), "--configs", str(tmp_path / "configs")]
    command += ["--folder", str(tmp_path / "demo")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]

    solved = {
        row: json.loads((tmp_path / f"demo/seed_0/test_{row}.json").read_text())["test/solved"]
        for row in ("sft", "further", "winners", "dpo")
    }
    for title in ("SFT on the sloppy", "further SFT steps", "on correct answers", "+ DPO", "tensorboard --logdir"):
        assert title in result.stdout
    assert f"{100 * solved['dpo']:5.1f}" in result.stdout
    assert solved["sft"] > 0.5, solved
    assert solved["dpo"] > solved["sft"], solved
    aligned = json.loads((tmp_path / "demo/seed_0/fit_dpo.json").read_text())
    assert aligned["val/rewards/accuracies"] > 0.65, aligned
    assert aligned["val/rewards/margins"] > 0.02, aligned
