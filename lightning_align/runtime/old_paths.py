"""Module paths of earlier releases, so that configurations and checkpoints that hold them can still be read."""

from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "lightning_align"
MOVED: dict[str, tuple[str, ...]] = {
    "callbacks": ("training.callbacks",),
    "datamodule": ("training.datamodule",),
    "distributed": ("runtime.ranks", "runtime.files"),
    "hub": ("runtime.hub",),
    "logprobs": (
        "scoring.targets",
        "scoring.head",
        "scoring.logits",
        "scoring.grouping",
        "scoring.logprobs",
        "scoring.sums",
        "scoring.collisions",
    ),
    "memory": ("runtime.memory",),
    "metrics": ("training.metrics",),
    "module": ("training.module",),
    "pairwise": ("scoring.ratios", "scoring.losses", "scoring.objective"),
    "reference": (
        "references.protocol",
        "references.frozen",
        "references.average",
        "references.moving",
        "references.update",
    ),
    "schedules": ("training.schedules",),
    "stored": ("references.stored",),
}
"""Earlier module of the package -> the modules that hold its names now."""


class OldPaths(MetaPathFinder, Loader):
    """Imports a module of ``MOVED`` as an alias: its names are the objects of the new modules."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Claim the modules of ``MOVED`` and no others."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the alias."""
        for home in MOVED[module.__name__.rpartition(".")[2]]:
            names = vars(import_module(f"{PACKAGE}.{home}"))
            vars(module).update({name: value for name, value in names.items() if not name.startswith("_")})
