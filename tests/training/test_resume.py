"""A run that is killed without warning, and again, is the uninterrupted one bit for bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toys import largest_difference

ROOT = Path(__file__).parent.parent.parent


def same(a: Any, b: Any) -> bool:
    """Equality of nested containers with tensors in them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.study
@pytest.mark.timeout(1200)
def test_ten_kills_change_nothing(full_studies: bool, tmp_path: Path) -> None:
    """Policy, moving reference, optimizer, scheduler, validation, the rows of each step and their losses, with dropout."""
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), str(tmp_path), "10" if full_studies else "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["steps"] == 36 and len(whole["seen"]["rows"]) == 66  # six epochs of eleven, each ending in half a step
    assert largest_difference(whole["module"], killed["module"]) == 0
    for name in whole:
        assert same(whole[name], killed[name]), name
