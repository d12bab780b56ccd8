"""Do something as soon as another package imports a module, without importing it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class AfterImport:
    """A finder that calls a function after a module is imported, or at once if it is imported already."""

    def __init__(self, actions: Mapping[str, Callable[[], None]]) -> None:
        """Set up the finder, which is then to be put first into ``sys.meta_path``.

        Args:
            actions: A function for each name of a module.
        """
        self.actions = dict(actions)
        self._busy = False
        for name, action in self.actions.items():
            if name in sys.modules:
                action()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec that the other finders find, with a loader that also calls the function."""
        if name not in self.actions or self._busy:
            return None
        self._busy = True
        try:
            spec = find_spec(name)
        finally:
            self._busy = False
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, self.actions[name])  # type: ignore[assignment]  # it passes all else on
        return spec


class _Loader:
    """A loader that calls a function after the module is executed."""

    def __init__(self, loader: Any, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
