"""Names that the command line knows: classes, their arguments, and what other libraries call the same things."""

import inspect
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from importlib import import_module
from typing import Any

ALIASES = {
    "learning_rate": ("lr",),
    "lr": ("learning_rate",),
    "path": ("source", "dirpath", "save_dir"),
    "file": ("source",),
    "r": ("rank",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "target_modules": ("targets",),
    "vocab_size": ("num_tokens",),
    "num_layers": ("depth",),
    "hidden_size": ("dim",),
    "max_tokens": ("max_new_tokens",),
}
"""Names of other libraries, and what the same thing can be called here."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'a' or 'b'?`` with the nearest names, or nothing if none is near."""
    found = near(name, names)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def near(name: str, names: Iterable[str]) -> list[str]:
    """Return the one or two names that are nearest, whatever their case: one if it is very near."""
    by_lower = {other.lower(): other for other in names}
    found = get_close_matches(name.lower(), by_lower, n=2, cutoff=0.6)
    if found and SequenceMatcher(None, name.lower(), found[0]).ratio() >= 0.8:
        found = found[:1]
    if not found and len(name) >= 4:  # `wandb` is the beginning of WandbLogger
        found = [other for other in by_lower if other.startswith(name.lower())][:2]
    return [by_lower[match] for match in found]


def parameters(path: str) -> list[str]:
    """Return the arguments of a class by its import path, or nothing if it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    names: dict[str, None] = {}
    for base in getattr(found, "__mro__", ()):
        if "__init__" not in vars(base):
            continue
        signature = inspect.signature(base.__init__).parameters.values()
        names |= dict.fromkeys(
            p.name for p in signature if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        )
        if all(p.kind != p.VAR_KEYWORD for p in signature):
            break
    return list(names)


def classes() -> dict[str, str]:
    """Return the classes that need no module path: name -> what to write."""
    names: dict[str, str] = {}
    for module in ("torch.optim.lr_scheduler", "torch.optim", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"):
        found = import_module(module)
        # Of what these modules define: they import classes of the standard library, too.
        public = [
            name
            for name, value in vars(found).items()
            if inspect.isclass(value) and value.__module__.startswith(module.rpartition(".")[0]) and not name.startswith("_")
        ]
        names |= {name: f"{module}.{name}" if module.startswith("torch") else name for name in public}
    own = import_module("lightning_align")
    return names | {name: name for name in own.__all__ if name[0].isupper()}
