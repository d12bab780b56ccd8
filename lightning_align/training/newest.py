"""The newest checkpoint of a run that can be resumed from, for ``--ckpt_path auto``."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_align.models.checkpoint import gather_command, read_checkpoint
from lightning_align.models.integrity import SHARDS_META, check_checkpoint
from lightning_align.runtime.run_folder import UNLOGGED
from lightning_align.training.place import KEY

CHOSEN = "LIGHTNING_ALIGN_CKPT_PATH"
"""The environment variable in which a process tells the ranks that it starts what it has chosen."""


class Found(NamedTuple):
    """The result of a search."""

    path: Path | None
    """The newest checkpoint that a run can resume from, or None."""
    step: int
    """The number of optimizer steps in it."""
    skipped: list[str]
    """Newer files that cannot be used, each with the reason."""


def checkpoint_folders(trainer: Mapping[str, Any]) -> list[Path]:
    """Return where a run saves checkpoints, in all its versions.

    Args:
        trainer: The arguments of the Trainer, as in a configuration.
    """
    root = Path(trainer.get("default_root_dir") or (UNLOGGED if trainer.get("logger") is False else "."))
    # Only these: the default root is the working directory, which may hold anything.
    found = [root / "checkpoints"]
    for callback in _listed(trainer.get("callbacks")):
        arguments = callback.get("init_args") or {}
        found += [Path(arguments[name]) for name in ("dirpath", "folder") if isinstance(arguments.get(name), (str, Path))]
    for logger in _listed(trainer.get("logger")):
        arguments = logger.get("init_args") or {}
        place = arguments.get("save_dir") or arguments.get("root_dir") or arguments.get("dir")
        name = arguments.get("name", "lightning_logs") or ""
        found.append(Path(place or root) / str(name))
    if trainer.get("logger") in (None, True):
        found.append(root / "lightning_logs")
    return list(dict.fromkeys(found))


def newest_checkpoint(folders: Iterable[Path], root: str | Path | None, *, resumes: bool, module: str | None = None) -> Found:
    """Find the newest complete checkpoint.

    Args:
        folders: Where to look, with all folders in them.
        root: The default folder of the Trainer, where Lightning saves when SLURM requeues a job. Default is the working
            directory. The folders in it are not searched.
        resumes: Whether a run is to be resumed, for which weights alone are too little.
        module: The name of the class of the module. Checkpoints of other classes are skipped.
    """
    root = Path(root or ".")
    listed = [path for folder in folders for path in sorted(folder.rglob("*.ckpt"))]
    listed += [*sorted(root.glob("hpc_ckpt_*.ckpt")), *sorted(root.glob("interrupted.ckpt"))]
    # A link to a checkpoint is that checkpoint. Files may vanish while they are listed, since the run may still be going on.
    listed = [*filter(Path.is_symlink, listed), *reversed([path for path in listed if not path.is_symlink()])]
    by_place = {path.resolve(): path for path in listed if path.exists()}
    skipped: list[str] = []
    for path in sorted(by_place.values(), key=_saved_at, reverse=True):
        try:
            step = _usable(path, resumes=resumes, module=module)
        except ValueError as error:
            skipped.append(str(error))
            continue
        return Found(path, step, skipped)
    return Found(None, 0, skipped)


def choose_checkpoint(trainer: Mapping[str, Any], *, resumes: bool, module: str | None = None) -> Found:
    """Find the newest complete checkpoint of a run, or take the choice of the process that started this one.

    Args:
        trainer: The arguments of the Trainer, as in a configuration.
        resumes: See `newest_checkpoint`.
        module: See `newest_checkpoint`.
    """
    told = json.loads(os.environ.get(CHOSEN, "{}"))
    if told.get("process") == os.getppid() and "LOCAL_RANK" in os.environ:
        return Found(None if told["path"] is None else Path(told["path"]), told["step"], [])
    found = newest_checkpoint(checkpoint_folders(trainer), trainer.get("default_root_dir"), resumes=resumes, module=module)
    path = None if found.path is None else str(found.path)
    os.environ[CHOSEN] = json.dumps({"process": os.getpid(), "path": path, "step": found.step})
    return found


def _usable(path: Path, *, resumes: bool, module: str | None) -> int:
    """Return the step of a checkpoint.

    Raises:
        ValueError: If the checkpoint cannot be used, with the reason.
    """
    if gather_command(path) is not None:
        check_checkpoint(path)
        try:
            content = torch.load(path / SHARDS_META, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types here
            raise ValueError(f"checkpoint {path} cannot be read ({type(error).__name__} in {SHARDS_META})") from error
    else:
        content = read_checkpoint(path)
    if "global_step" not in content or (resumes and "loops" not in content):
        raise ValueError(f"checkpoint {path} holds weights only, from which no run can be resumed")
    if resumes and gather_command(path) is None and "optimizer_states" not in content:
        raise ValueError(f"checkpoint {path} holds no optimizer state, so no run can be resumed from it")
    place = content.get(KEY)
    if resumes and isinstance(place, Mapping) and place.get("torn"):
        raise ValueError(f"checkpoint {path} was saved in the middle of an optimizer step")
    saved = str((content.get("hyper_parameters") or {}).get("_class_path") or "")
    if module and saved and saved.rpartition(".")[2] != module.rpartition(".")[2]:
        raise ValueError(f"checkpoint {path} is of a run of {saved}")
    return int(content["global_step"])


def _saved_at(path: Path) -> float:
    try:
        return (path / SHARDS_META if path.is_dir() else path).stat().st_mtime
    except OSError:
        return 0.0


def _listed(value: Any) -> list[Mapping[str, Any]]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, Mapping)]
