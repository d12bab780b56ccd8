"""A run that SIGTERM or Ctrl-C ends leaves a checkpoint of the step that it reached, and a status that is not 0."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_align import cli
from tests.cli.conftest import ROWS
from tests.cli.runs import config, write_rows

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs the command line in forks of one process, which has the imports already."""
    command = [sys.executable, "-m", "tests.cli.interrupted"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as server:
        assert server.stdin is not None and server.stdout is not None

        def start(folder: Path, configuration: str, signal: str, where: str, *extra: str) -> subprocess.CompletedProcess[str]:
            command = where if where in ("validate", "predict") else "fit"
            output, arguments = folder / "output.txt", [command, "--config", configuration, *extra]
            request = {"folder": str(folder), "output": str(output), "signal": signal, "where": where, "arguments": arguments}
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            return subprocess.CompletedProcess([], int(server.stdout.readline()), "", output.read_text())

        yield start
        server.stdin.close()


def finish(configuration: str, *extra: str) -> None:
    """Run the command to its end in this process, which has its imports already."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.run(["fit", "--config", configuration, *extra])
    finally:
        torch.set_num_threads(threads)


def settings(folder: Path, rows: str, name: str) -> str:
    """Three batches per epoch, in steps of two and one, and a validation after each epoch; no checkpoint but the last."""
    keep = {"dirpath": str(folder / name), "every_n_train_steps": 100, "save_last": name != "plain"}
    content = yaml.safe_load(Path(config("sft", folder)).read_text(encoding="utf-8"))
    content["data"]["init_args"] |= {"train": rows, "validation": rows}
    callbacks = [{"class_path": "ModelCheckpoint", "init_args": keep}]
    content["trainer"] |= {"max_steps": 9, "accumulate_grad_batches": 2, "callbacks": callbacks, "logger": False}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a run that no signal stops."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning-align"])
        finish(settings(folder, write_rows(folder / "sft.jsonl", ROWS), "whole"))
    checkpoint: dict[str, Any] = torch.load(folder / "whole" / "last.ckpt", weights_only=True)
    return checkpoint


@pytest.mark.parametrize(
    "signal, where, status, extra",
    [
        ("SIGTERM", "step", 143, []),
        ("SIGINT", "step", 130, []),
        ("SIGTERM", "validation", 143, []),
        ("SIGINT", "group", 130, ["--data.num_workers=1"]),
    ],
)
def test_a_stopped_run_goes_on_where_it_was(
    run: Run, signal: str, where: str, status: int, extra: list[str], folder: Path, sft_rows: str, whole: dict[str, Any]
) -> None:
    stopped = run(folder, settings(folder, sft_rows, "last"), signal, where, *extra)
    assert stopped.returncode == status, stopped.stderr[-2000:]
    assert "Traceback" not in stopped.stderr
    path = folder / "last" / "last.ckpt"
    assert stopped.stderr.count(f"to resume, repeat the command with --ckpt_path {path}") == 1
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] >= 4
    finish(settings(folder, sft_rows, "last"), *extra, "--ckpt_path", str(path))
    result = torch.load(path, weights_only=True)
    assert result["global_step"] == whole["global_step"] == 9
    assert all(torch.equal(result["state_dict"][name], value) for name, value in whole["state_dict"].items())


def test_without_a_last_checkpoint_it_has_a_name_of_its_own(run: Run, folder: Path, sft_rows: str) -> None:
    stopped = run(folder, settings(folder, sft_rows, "plain"), "SIGTERM", "step")
    assert stopped.returncode == 143
    assert f"--ckpt_path {folder / 'plain' / 'interrupted.ckpt'}" in stopped.stderr
    assert torch.load(folder / "plain" / "interrupted.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    "signal, command, status", [("SIGINT", "validate", 130), ("SIGTERM", "predict", 143), ("SIGINT", "predict", 130)]
)
def test_other_commands_end_with_the_status_of_the_signal(
    run: Run, signal: str, command: str, status: int, folder: Path, sft_rows: str
) -> None:
    stopped = run(folder, settings(folder, sft_rows, "last"), signal, command, *([f"--data.predict={sft_rows}"]))
    assert stopped.returncode == status, stopped.stderr[-2000:]
    assert "Traceback" not in stopped.stderr


def long_settings(folder: Path, method: str) -> str:
    """A run with a stored reference, or of self-play in two iterations."""
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2), "response": str(i + 1)} for i in range(12)]
    names = ("prompt", "chosen", "rejected") if method == "dpo" else ("prompt", "response")
    path = write_rows(folder / "rows.jsonl", [{name: row[name] for name in names} for row in rows])
    content = yaml.safe_load(Path(config(method, folder)).read_text(encoding="utf-8"))
    content["data"]["init_args"] |= {"train": path, "validation": path}
    callbacks: list[dict[str, Any]] = [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept", "save_last": True}}]
    if method == "dpo":
        content["model"]["init_args"] |= {"reference": "stored", "reference_cache": "stored"}
    else:
        content["model"]["init_args"]["generation"] |= {"batch_size": 4}
        callbacks.append({"class_path": "SelfPlayGeneration", "init_args": {"iterations": 2, "folder": "sets"}})
        content["trainer"] |= {"max_epochs": -1, "max_steps": -1}
    content["trainer"] |= {"callbacks": callbacks, "logger": False, "num_sanity_val_steps": 0}
    place = folder / f"{method}.yaml"
    place.write_text(yaml.safe_dump(content))
    return str(place)


@pytest.mark.parametrize(
    "signal, where, status",
    [("SIGTERM", "scoring=2", 143), ("SIGINT", "generating=2", 130), ("SIGTERM", "generating=8", 143)],
)
def test_work_before_and_between_steps_is_kept(run: Run, signal: str, where: str, status: int, folder: Path) -> None:
    configuration = long_settings(folder, "dpo" if where.startswith("scoring") else "spin")
    stopped = run(folder, configuration, signal, where)
    assert stopped.returncode == status, stopped.stderr[-2000:]
    assert "Traceback" not in stopped.stderr
    pattern = "stored/*/*.safetensors" if where.startswith("scoring") else "sets/*/*/part-*.jsonl"
    kept = {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}
    assert len(kept) == (1 if where.startswith("scoring") else int(where.partition("=")[2]))
    last = folder / "kept" / "last.ckpt"
    finish(configuration, *(["--ckpt_path", str(last)] if last.exists() else []))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was made is not made again"
    assert torch.load(last, weights_only=True)["global_step"] == (3 if where.startswith("scoring") else 9)
    assert len(list(folder.glob(pattern))) > len(kept)
