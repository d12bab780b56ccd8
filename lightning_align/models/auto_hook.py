"""Teaching transformers the folders of this package, without importing transformers.

A folder that `write_model` wrote for a `PaLM` names a model type of this package. The auto classes of transformers know it when
both packages are imported, in either order. So importing this package adds a finder: when the auto classes are imported, it
registers the classes of `lightning_align.models.auto`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REGISTERS = {
    "transformers.models.auto.configuration_auto": "register_config",
    "transformers.models.auto.modeling_auto": "register_model",
}
"""The modules with the auto classes, and the function that registers ours with each."""


def register(name: str) -> None:
    """Register the classes of this package with one of the modules of `REGISTERS`, which is imported."""
    getattr(import_module("lightning_align.models.auto"), REGISTERS[name])()


class TransformersHook:
    """A finder that registers the classes of this package as soon as transformers imports its auto classes."""

    def __init__(self) -> None:
        """Register at once where transformers is imported already."""
        self._busy = False
        for name in REGISTERS:
            if name in sys.modules:
                register(name)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec that the other finders find, with a loader that also registers."""
        if name not in REGISTERS or self._busy:
            return None
        self._busy = True
        try:
            spec = find_spec(name)
        finally:
            self._busy = False
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # it passes all else on
        return spec


class _Loader:
    """A loader that registers after the module is executed."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(module.__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
