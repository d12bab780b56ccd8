"""Projects that import ``pytorch_lightning``: the same code as ``lightning.pytorch``, with other classes.

A Trainer of one package refuses modules of the other with "`model` must be a `LightningModule`". It calls a function that knows
the classes of the two packages themselves and not those that derive from them. This function is extended here to know ours.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from lightning_align.runtime.after_import import AfterImport

OTHER = "pytorch_lightning"
CHECKED_IN = f"{OTHER}.utilities.compile"
"""The module of the other package in which a Trainer checks its module."""
ADVICE = (
    "Import everything from one package: `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`, also "
    "for callbacks and loggers. The names are the same."
)


def explain_mixed_imports() -> None:
    """Make the other package say which import to change if its Trainer gets a module of ours."""
    module: Any = sys.modules[CHECKED_IN]
    check: Callable[[object], None] | None = getattr(module, "_check_mixed_imports", None)
    if check is None or getattr(check, "knows_lightning_align", False):
        return

    def check_and_explain(instance: object) -> None:
        check(instance)
        instance = getattr(instance, "_orig_mod", instance)  # of a compiled module
        if any(base.__module__.startswith("lightning.pytorch.") for base in type(instance).__mro__):
            raise TypeError(
                f"{type(instance).__qualname__} is a LightningModule of the package `lightning` (lightning.pytorch), but the "
                f"Trainer is of the package `{OTHER}`. {ADVICE}"
            )

    check_and_explain.knows_lightning_align = True  # type: ignore[attr-defined]
    module._check_mixed_imports = check_and_explain


class NamespacesHook(AfterImport):
    """A finder that extends the check of the other package as soon as it is imported."""

    def __init__(self) -> None:
        """Extend the check at once where the other package is imported already."""
        super().__init__({CHECKED_IN: explain_mixed_imports})


def foreign_parts(parts: Iterable[object]) -> list[str]:
    """Return the names of the classes among a Trainer's callbacks and loggers that are of the other package."""
    found = []
    for part in parts:
        modules = [base.__module__.partition(".")[0] for base in type(part).__mro__]
        if OTHER in modules and "lightning" not in modules:
            found.append(type(part).__name__)
    return found
