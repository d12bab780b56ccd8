"""Signals to two ranks and restarts by torchrun: the run goes on where it was and ends as if it had not been stopped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import ROWS
from tests.cli.runs import TINY, write_rows
from tests.conftest import FULL
from tests.distributed.harness import ROOT, launch

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent
SIGNALS = ("SIGUSR1-1", "SIGUSR1-0+1", "SIGTERM-0", "SIGTERM-0+1", "SIGINT-0+1")
"""Signals, each with the ranks that get it. SIGUSR1 is the one that SLURM sends before it requeues a job."""
CASES = [
    ("ddp", "sft", SIGNALS if FULL else SIGNALS[1:2]),
    ("fsdp2", "sft", SIGNALS),
    ("ddp", "dpo,spin,calm", SIGNALS[1:2]),
    ("ddp", "retro", SIGNALS[1:2]),
    ("fsdp2", "dpo,spin,calm", SIGNALS[1:2]),
]


@pytest.mark.parametrize(("strategy", "methods", "signals"), CASES if FULL else CASES[:1])
def test_two_ranks_stop_at_one_boundary(strategy: str, methods: str, signals: tuple[str, ...], tmp_path: Path) -> None:
    """The script asserts; see its `main`."""
    launch(HERE / "stops.py", str(tmp_path), strategy, methods, ",".join(signals))


def settings(folder: Path) -> str:
    """Runs of two ranks: two batches per epoch and rank, in steps of two micro-batches, and a checkpoint every step."""
    rows = write_rows(folder / "rows.jsonl", [*ROWS, *({**row, "prompt": f"0{row['prompt']}"} for row in ROWS)])
    keep = {"dirpath": str(folder / "kept"), "every_n_train_steps": 1, "save_last": True}
    backbone = {**TINY, "init_args": {**TINY["init_args"], "ff_dropout": 0.1}}  # type: ignore[dict-item]
    content = {
        "seed_everything": 3,
        "model": {"class_path": "SFTModule", "init_args": {"backbone": backbone}},
        "data": {
            "class_path": "SFTDataModule",
            "init_args": {"train": rows, "batch_size": 2, "max_length": 32, "cache_dir": str(folder / "cache")},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "gloo"}},
            "max_steps": 6,
            "accumulate_grad_batches": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": keep}],
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_torchrun_starts_the_ranks_again_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """One worker is killed in the middle of an accumulation window. The same command goes on with `--ckpt_path auto`."""
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    for folder in (whole, lost):
        folder.mkdir()
    (whole / "lost").touch()  # nothing is killed
    launch(HERE / "elastic.py", str(whole), "fit", "--config", settings(whole), "--ckpt_path", "auto")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--standalone", str(HERE / "elastic.py"), str(lost)]
    command += ["fit", "--config", settings(lost), "--ckpt_path", "auto"]
    own = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # otherwise torch 2.13 finds the addresses of the ended workers
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=500, cwd=lost)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "auto finds no checkpoint" in told and "(step 3)" in told and "exitcode: -9" in told
    ends = {name: torch.load(tmp_path / name / "kept" / "last.ckpt", weights_only=True) for name in ("whole", "lost")}
    assert ends["lost"]["global_step"] == ends["whole"]["global_step"] == 6
    weights, expected = (ends[name]["state_dict"] for name in ("lost", "whole"))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
