"""Errors of libraries in a line that says what to do."""

import re
from typing import Any

from lightning.fabric.strategies import STRATEGY_REGISTRY

from lightning_align.console.names import did_you_mean

METHODS = ("SFT", "DPO", "SPIN", "CALM", "RETRO")
"""Methods that have a module and a data module."""


def advise(error: BaseException) -> str:
    """Return the message of a library's error, and what to do about it.

    Args:
        error: An error that a user can repair: a setting that Lightning refuses, a missing package, a full device.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        if error.name is None:  # of Lightning, which says how to install it
            return text
        name = error.name
        return f"the package {name!r} is not installed ({text}). Install it, or choose a setting that does not need it."
    if type(error).__name__ == "OutOfMemoryError":
        wanted = re.search(r"Tried to allocate [\d.]+ \w+", text)
        return (
            f"the device is out of memory ({wanted[0] if wanted else text}). Lower --data.batch_size or --data.max_length, set "
            "--model.activation_checkpointing true, or train with --model.lora.rank 16 or --config trainer/fsdp2."
        )
    gpu = r"accelerator.*(?:CUDA|GPU|MPS).*not available|`(?:CUDA|MPS)Accelerator` can not run on your system"
    if "No supported gpu backend found" in text or re.search(gpu, text, re.I):
        return f"{text.rstrip('!.')}: torch finds no GPU here. Use --trainer.accelerator cpu. `lightning-align env` shows more."
    if "requested gpu" in text and "machine only has" in text:
        return f"{text} Set --trainer.devices to devices that exist: lightning-align env"
    return text


def with_nearest(text: str) -> str:
    """Add the nearest name to a message that lists what is possible: ``must be one of a, b, but got 'c'``.

    Args:
        text: The message of a ValueError, or of a library.
    """
    strategy = re.search(r"invalid strategy name: `strategy='([^']+)'`", text)
    if strategy:
        names = [name for name in STRATEGY_REGISTRY if not re.search("spawn|fork|notebook|xla|offload|stage|^dp$", name)]
        return f"no strategy {strategy[1]!r}{did_you_mean(strategy[1], names) or '.'}\nStrategies: {', '.join(names)}"
    metric = re.search(r"metric `([^`]+)`,? which is not available[^:]*:((?: ?`[^`]+`,?)+)", text)
    if metric:
        names = re.findall(r"`([^`]+)`", metric[2])
        return f"no metric {metric[1]!r} is logged{did_you_mean(metric[1], names) or '.'}\nMetrics: {', '.join(names)}"
    choice = re.search(
        r"must be one of ([\w, /.-]+), but got '([^']*)'|accelerator='([^']*)'`\. Available names are: ([\w, ]+)", text
    )
    if choice:
        names = re.split(r", (?:or )?", choice[1] or choice[4])
        return text.rstrip(".") + (did_you_mean(choice[2] or choice[3], names) or ".")
    return text


def mismatch(module: Any, data: Any, error: BaseException) -> str | None:
    """Say which data module belongs to a module, if its batches are not those that the module reads.

    Args:
        module: The module of the run.
        data: The data module of the run.
        error: What the first batch raised.

    Returns:
        The message, or None if the two belong together or are of the user.
    """
    names = (type(module).__name__, type(data).__name__)
    fits = f"{names[0].removesuffix('Module')}DataModule"
    known = [f"{method}DataModule" for method in METHODS]
    if fits not in known or names[1] == fits or names[1] not in known:
        return None
    return f"{names[0]} cannot read the batches of {names[1]} ({type(error).__name__}: {error}). Use --data {fits}."
