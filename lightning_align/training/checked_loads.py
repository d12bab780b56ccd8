"""Checking a checkpoint before a Trainer restores anything from it.

Lightning names the file in its arguments only, opens it without a comparison of its checksums, and fails at damaged content
with the error of whatever line meets it.
"""

import inspect
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from lightning_align.models.checkpoint import gather_command
from lightning_align.models.integrity import check_checkpoint, check_values, reason_of
from lightning_align.runtime.kinds import hints_of

LOOPS: Final = {
    TrainerFn.FITTING: "fit_loop",
    TrainerFn.VALIDATING: "validate_loop",
    TrainerFn.TESTING: "test_loop",
    TrainerFn.PREDICTING: "predict_loop",
}
"""The state that each command of the Trainer restores."""
TYPES: Final = {
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "callbacks": Mapping,
    "hyper_parameters": Mapping,
    "loops": Mapping,
    "optimizer_states": Sequence,
    "lr_schedulers": Sequence,
}
"""What a Trainer reads of a checkpoint."""
METHOD: Final = "method"
"""Where a checkpoint keeps what `method_of` returns."""
LOADING: Final = ("map_location", "hparams_file", "strict", "weights_only")
"""Arguments of ``load_from_checkpoint`` that are not those of a module."""
PRECISION: Final = "precision"
"""Where a checkpoint keeps the precision of the Trainer."""
REQUIRED: Final = ("pytorch-lightning_version", "epoch", "global_step")


def check_loads(trainer: L.Trainer, *, sharded: bool) -> None:
    """Have every checkpoint checked that a Trainer loads from now on.

    Args:
        trainer: The Trainer, with its strategy.
        sharded: Whether the weights are sharded, so that a folder can be a checkpoint.
    """
    strategy: Any = trainer.strategy
    if "load_checkpoint" in vars(strategy):
        return
    load, load_optimizers = strategy.load_checkpoint, strategy.load_optimizer_state_dict

    def checked(path: str | Path, *arguments: Any, **options: Any) -> Any:
        check_path(path, sharded=sharded)
        check_checkpoint(path)
        try:
            content = load(path, *arguments, **options)
        except (ValueError, FileNotFoundError):
            raise
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise _unreadable(path, reason_of(error)) from error
        check_content(content, path, trainer.state.fn, whole=not sharded)
        return content

    def checked_optimizers(content: Mapping[str, Any]) -> None:
        check_states(content["optimizer_states"], trainer.optimizers, trainer.ckpt_path or "")
        load_optimizers(content)

    strategy.load_checkpoint = checked
    if not sharded:  # otherwise torch has loaded them by name
        strategy.load_optimizer_state_dict = checked_optimizers


def check_path(path: str | Path, *, sharded: bool) -> None:
    """Check that a path leads to what can be a checkpoint. A URL, and a path that leads nowhere, are left to Lightning.

    Raises:
        ValueError: If it is a folder that is no checkpoint, or a device.
    """
    path = Path(path)
    command = gather_command(path)
    if path.is_dir() and command is None:
        inside = sorted(str(found) for found in path.rglob("*.ckpt"))[:5]
        hint = f"Pass a file, such as {', '.join(inside)}." if inside else "Pass the file of a checkpoint."
        raise ValueError(f"checkpoint {path} is a folder. {hint}")
    if command is not None and not sharded:
        raise ValueError(
            f"checkpoint {path} is sharded (a folder), which needs a sharded strategy. Use one, or gather it into a file with: "
            f"{command}"
        )
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ValueError(f"checkpoint {path} is no file. Pass the file of a checkpoint.")


def check_content(content: Any, path: str | Path, command: TrainerFn | None, *, whole: bool = True) -> None:
    """Check that a checkpoint has the parts that a Trainer restores.

    Args:
        content: What was loaded.
        path: Where from, for the message.
        command: What the Trainer does.
        whole: Whether the weights must be in it. A sharded strategy has loaded them already.

    Raises:
        ValueError: If a part is missing, or is of another type.
    """
    if not isinstance(content, dict):
        raise _unreadable(path, f"it holds a {type(content).__name__} instead of a dictionary")
    missing = [name for name in REQUIRED if name not in content]
    if missing:
        raise ValueError(
            f"checkpoint {path} was not written by a Trainer: it has no {missing[0]}. Give weights alone as `init_from`."
        )
    for name, kind in TYPES.items():
        if name in content and (not isinstance(content[name], kind) or (kind is Sequence and isinstance(content[name], str))):
            raise _unreadable(path, f"its {name} is of type {type(content[name]).__name__}")
    if "state_dict" in content or whole:
        check_values(content.get("state_dict"), path)
    loops, loop = content.get("loops"), LOOPS.get(command) if command is not None else None
    resumes = command == TrainerFn.FITTING and "optimizer_states" in content
    if (resumes or loops is not None) and loop and not isinstance((loops or {}).get(loop), Mapping):
        raise _unreadable(path, f"it lacks the place of the run (loops, {loop})")
    if resumes:
        absent = [name for name in ("epoch_progress", "epoch_loop.batch_progress") if name not in content["loops"]["fit_loop"]]
        if absent:
            raise _unreadable(path, f"it lacks the place of the run (loops, fit_loop, {absent[0]})")


def check_module_file(path: str | Path, kind: type[L.LightningModule], options: Mapping[str, Any]) -> None:
    """Check the file that a module is to be built from.

    Args:
        path: The file. A URL, and a path that leads nowhere, are left to Lightning.
        kind: The class of the module.
        options: The arguments of ``load_from_checkpoint``. Unless ``weights_only`` is false, the file may hold tensors and
            primitive types only.

    Raises:
        ValueError: If the file is damaged, no checkpoint of a Trainer, of another method, or has hyperparameters that the class
            does not take.
    """
    check_path(path, sharded=False)
    check_checkpoint(path)
    if not Path(path).is_file():
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types here
        if options.get("weights_only") is not False:
            raise _unreadable(path, reason_of(error)) from error
        return
    check_content(content, path, None)
    saved, own = content.get(METHOD), method_of(kind)
    if saved and own and saved != own:
        raise ValueError(
            f"checkpoint {path} is of a run of {saved}, not of {own}. Use {saved}.load_from_checkpoint, or give its weights as "
            "`init_from`."
        )

    if kind.__module__.partition(".")[0] != __name__.partition(".")[0]:
        return
    # Lightning takes all others for arguments of the class, which fails in a line that names no file. For a class without
    # keyword arguments of any name, it leaves out what was saved.
    any_name = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(kind).parameters.values())
    saved_names = content.get("hyper_parameters") or () if any_name else ()
    other = "Load it with the class that it was saved from, of the same or a later release, or give its weights as `init_from`."
    for source, names, remedy in (
        (f"checkpoint {path}", saved_names, other),
        ("load_from_checkpoint", options, "Leave them out."),
    ):
        strange = [name for name in names if not name.startswith("_") and name not in {*hints_of(kind), *LOADING}]
        if strange:
            raise ValueError(f"{source} has arguments that {kind.__name__} does not take: {', '.join(strange)}. {remedy}")


def check_states(states: Sequence[Any], optimizers: Sequence[Optimizer], path: str | Path) -> None:
    """Compare the states of optimizers with what these train.

    Args:
        states: The states of a checkpoint that is not sharded.
        optimizers: The optimizers of the run.
        path: The path of the checkpoint, for the message.

    Raises:
        ValueError: If their numbers differ, or the sizes of the weights.
    """
    if len(states) != len(optimizers):
        raise _unreadable(path, f"it has the states of {len(states)} optimizers, and the run has {len(optimizers)}")
    for state, optimizer in zip(states, optimizers, strict=True):
        if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
            raise _unreadable(path, "the state of an optimizer in it is incomplete")
        saved = [number for group in state["param_groups"] for number in group["params"]]
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len(saved) != len(own):
            raise ValueError(
                f"checkpoint {path} must train {len(own)} weights, as this run does, but trains {len(saved)}. Give the run the "
                "layers, connections, adapters and frozen weights that the checkpoint was written with."
            )
        for number, parameter in zip(saved, own, strict=True):
            kept = state["state"].get(number, {})
            for name, value in kept.items():
                # Adafactor keeps the sums of rows and columns, other optimizers flat copies.
                if name in ("exp_avg", "exp_avg_sq", "momentum_buffer") and isinstance(value, Tensor):
                    if value.numel() not in (1, math.prod(parameter.shape)):
                        raise _unreadable(
                            path,
                            f"the state of its optimizer is of weights of the shape {tuple(value.shape)} instead of "
                            f"{tuple(parameter.shape)}",
                        )


def method_of(module: L.LightningModule | type[L.LightningModule]) -> str:
    """Return the class of this package that a module, or a class of modules, is of. Empty for others."""
    package, kind = __name__.partition(".")[0], module if isinstance(module, type) else type(module)
    return next((base.__name__ for base in kind.__mro__ if base.__module__.partition(".")[0] == package), "")


def check_method(saved: str | None, module: L.LightningModule, path: str | os.PathLike[str] | None) -> None:
    """Check that a run is resumed with the method that it was begun with.

    Args:
        saved: What `method_of` returned for the module of the checkpoint. None if the checkpoint does not say it.
        module: The module of the run.
        path: The path of the checkpoint, for the message.

    Raises:
        ValueError: If the methods differ.
    """
    own = method_of(module)
    if saved and own and saved != own:
        raise ValueError(
            f"checkpoint {path} is of a run of {saved}, which a {own} cannot resume. Resume with {saved}, or start a new run "
            "from its weights with `init_from`."
        )


def warn_of_precision(saved: str | None, trainer: L.Trainer) -> None:
    """Warn if a run is resumed in another precision than it was begun with, which Lightning converts without a word.

    Args:
        saved: The precision in the checkpoint. None if the checkpoint does not say it.
        trainer: The Trainer of the run.
    """
    if saved is not None and saved != str(trainer.precision):
        rank_zero_warn(
            f"checkpoint {trainer.ckpt_path} is of a run with precision {saved}, and this run has {trainer.precision}. "
            f"Training goes on, but not as it would have. Give the Trainer precision {saved} to resume exactly."
        )


def _unreadable(path: str | Path, reason: str) -> ValueError:
    return ValueError(f"checkpoint {path} cannot be read ({reason}). Use an earlier checkpoint of the run.")
